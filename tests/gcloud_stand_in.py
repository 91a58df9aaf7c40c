"""A stand-in for `gcloud`: queued resources with states, hosts that run one job, failures that a test injects.

It keeps its state in the JSON file that GCLOUD_STAND_IN names. A test writes there

    lives            one entry for each time a resource is made:
        states       what `describe` says, one after the other; the last stays
        polls        what asking the hosts gives, one after the other; the last stays: a list with "running" or
                     "exit CODE" for each host, or "dead" where one does not answer. A poll may be
                     {"hosts": ..., "states": [...]}: from then on `describe` says these
        setup        "dead" where a host never answers, "broken" where installing fails on hosts that do
    create_errors    messages with which `create` fails, one after the other
    delete_failures  how many times `delete` fails

and reads: resource (None when nothing is rented), created, deleted, calls, copied.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

WHERE = {"--project", "--zone"}
FLAGS = {
    "create": {"--accelerator-type", "--runtime-version", "--node-id", "--node-count", "--node-prefix", "--spot",
               "--valid-until-duration", "--service-account"} | WHERE,
    "describe": {"--format"} | WHERE,
    "delete": {"--force", "--quiet"} | WHERE,
    "ssh": {"--node", "--worker", "--command"} | WHERE,
    "scp": {"--node", "--worker"} | WHERE,
}  # fmt: skip


def fail(message: str) -> None:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(1)


def take(items: list, otherwise=None):
    """The next of a list, whose last item stays."""
    return (items.pop(0) if len(items) > 1 else items[0]) if items else otherwise


def queued(state: dict, verb: str, arguments: list[str]) -> str:
    flags = dict(a.partition("=")[::2] for a in arguments if a.startswith("--"))
    names = [a for a in arguments if not a.startswith("--")]
    if unknown := set(flags) - FLAGS[verb]:
        fail(f"unrecognized arguments: {unknown}")
    if missing := WHERE - set(flags):
        fail(f"argument {missing}: must be specified")
    found = state["resource"]
    if verb == "create":
        if found:
            fail("ALREADY_EXISTS: the queued resource is there already")
        if not {"--accelerator-type", "--runtime-version"} <= set(flags) or ("--node-id" in flags) == (
            "--node-count" in flags
        ):
            fail("INVALID_ARGUMENT: accelerator type, runtime version, and either a node id or a node count")
        if errors := state["create_errors"]:
            fail(errors.pop(0))
        life = state["lives"].pop(0) if state["lives"] else {"states": ["WAITING_FOR_RESOURCES"]}
        state["resource"] = {"name": names[0], "flags": flags, "started": False, **life}
        state["created"] += 1
        return ""
    name = names[-1].partition(":")[0] if verb == "scp" else names[0]
    if not found or found["name"] != name:
        fail(f"NOT_FOUND: Resource '{name}' was not found")
    if verb == "describe":
        if "failedData" in flags["--format"]:
            return found.get("reason", "")
        found["now"] = take(found["states"])
        return found["now"]
    if verb == "delete":
        if state["delete_failures"]:
            state["delete_failures"] -= 1
            fail("INTERNAL: try again")
        if "--force" not in flags and found.get("now") != "SUSPENDED":
            fail("FAILED_PRECONDITION: the queued resource has nodes; use --force")
        state["resource"] = None
        state["deleted"] += 1
        return ""
    if found.get("now") != "ACTIVE":
        fail("FAILED_PRECONDITION: the queued resource is not ACTIVE")
    return hosts(state, found, verb, flags)


def hosts(state: dict, found: dict, verb: str, flags: dict) -> str:
    """What scp and ssh to the machines give."""
    if verb == "scp" or "host.sh log" in flags["--command"]:
        return "Traceback: the bake's last words" if verb == "ssh" else ""
    if found.get("setup") == "dead":
        fail("[0] Command execution on worker 1 failed: no route to host")
    if "uv pip install" in flags["--command"]:
        if found.get("setup") == "broken":
            fail("[0] Command execution on worker 0 failed: no matching distribution")
        return "jaxbake 0.1.0"
    if flags["--command"] == "true":
        return ""
    if "host.sh start" in flags["--command"]:
        found["started"] = True
        return "worker a running\nworker b running"
    if "host.sh stop" in flags["--command"]:
        return ""
    if not found["started"]:
        return "worker a idle\nworker b idle"
    poll = take(found["polls"], "dead")
    if isinstance(poll, dict):
        found["states"] = poll["states"]
        poll = poll["hosts"]
    if poll == "dead":
        fail("[1] Command execution on worker 1 failed: connection timed out")
    state["finished"] = all(said == "exit 0" for said in poll)
    return "\n".join(f"worker {name} {said}" for name, said in zip("abcd", poll, strict=False))


def storage(state: dict, arguments: list[str]) -> str:
    if arguments[0] == "rsync":
        if not state["finished"]:
            fail("the source has no results")
        state["copied"] = arguments[-1]
    if arguments[:2] == ["buckets", "describe"]:
        if state["bucket"] is None:
            fail("gs://bucket not found: 404.")
        return state["bucket"]
    if arguments[:2] == ["buckets", "create"]:
        state["bucket"] = next(a for a in arguments if a.startswith("--location=")).partition("=")[2].upper()
    return ""


def main() -> None:
    path, words = Path(os.environ["GCLOUD_STAND_IN"]), sys.argv[1:]
    empty = {"resource": None, "created": 0, "deleted": 0, "calls": [], "copied": None, "finished": False,
             "bucket": None, "create_errors": [], "delete_failures": 0, "lives": []}  # fmt: skip
    state = empty | json.loads(path.read_text())
    state["calls"].append(words)
    try:
        if words[:3] == ["compute", "tpus", "queued-resources"] and words[3] in FLAGS:
            said = queued(state, words[3], words[4:])
        elif words[0] == "storage":
            said = storage(state, words[1:])
        else:
            fail(f"Invalid choice: {words}")
        print(said)
    finally:
        path.write_text(json.dumps(state))


if __name__ == "__main__":
    main()
