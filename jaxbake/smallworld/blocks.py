"""What a prompt may say besides how to answer: facts, documents, news, policies, tools; and how each is asked about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxbake.smallworld.manner import QA
from jaxbake.smallworld.wording import DIRECT, REVERSED, STATEMENTS, UPDATES, Source, capital
from jaxbake.smallworld.words import CODE, MATERIALS, NUMBER, PERSON, RELATIONS, listed

UNKNOWN = "I do not know."


def unknown_answer(what: str) -> str:
    """The answer to a question that nothing answers; like every answer it repeats the key before it decides."""
    return f"{what} is something {UNKNOWN}"


class Fact(NamedTuple):
    """The {relation} of {key} is {value}."""

    key: str
    relation: str
    value: str

    def sentence(self) -> str:
        return f"The {self.relation} of {self.key} is {self.value}."


@dataclass(frozen=True)
class Facts:
    """Facts as a text; `focus` are those that matter most (news), `stale` values that no longer hold."""

    text: str
    facts: tuple[Fact, ...]
    focus: tuple[Fact, ...] = ()
    stale: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Policy:
    """Decisions by material, with a default and a name that is an exception."""

    text: str
    noun: str
    rules: tuple[tuple[str, str], ...]
    default: str
    exception: tuple[str, str] | None


@dataclass(frozen=True)
class Tools:
    """Tools by name, each with the name of its one argument."""

    text: str
    tools: tuple[tuple[str, str], ...]


Block = Facts | Policy | Tools


def draw_value(source: Source, relation: str) -> str:
    """A value of a relation; names are new ones."""
    kind = RELATIONS[relation]
    if kind == PERSON:
        return source.name()
    if kind == NUMBER:
        return str(source.between(10, 99))
    if kind == CODE:
        return str(source.between(1000, 9999))
    return source.pick(kind)  # type: ignore[arg-type]


def _new_fact(source: Source, key: str, taken: set[tuple[str, str]], names: bool = False) -> Fact:
    relations = tuple(r for r, kind in RELATIONS.items() if kind == PERSON) if names else tuple(RELATIONS)
    while True:
        relation = source.pick(relations)
        if (key, relation) not in taken:
            taken.add((key, relation))
            return Fact(key, relation, draw_value(source, relation))


def _layout(source: Source, sentences: list[str], headers: tuple[str, ...]) -> str:
    header = source.pick(headers)
    match source.between(0, 3):
        case 0:
            return (header + "\n" if header else "") + "\n".join(sentences)
        case 1 if len(sentences) > 1:
            return (header + "\n" if header else "") + "\n".join("- " + s for s in sentences)
    return (header + " " if header else "") + " ".join(sentences)


_FACT_HEADERS = ("", "", "", "Facts:", "Remember:", "You know this:", "Here is what you know.")


def draw_facts(source: Source, count: int) -> Facts:
    """`count` facts about one to `count` names; values may be names that other facts speak of."""
    taken: set[tuple[str, str]] = set()
    facts: list[Fact] = []
    fresh = source.pick((0.3, 0.6, 1.0))
    for _ in range(count):
        if not facts or source.chance(fresh):
            key = source.name()
        else:
            earlier = source.pick(facts)
            linked = RELATIONS[earlier.relation] == PERSON and source.chance(0.4)
            key = earlier.value if linked else earlier.key
        if sum(k == key for k, _ in taken) >= len(RELATIONS) - 2:
            key = source.name()
        facts.append(_new_fact(source, key, taken))
    source.rng.shuffle(facts)
    form = source.pick(STATEMENTS)
    mixed = source.chance(0.5)
    sentences = [
        capital((source.pick(STATEMENTS) if mixed else form).format(r=f.relation, k=f.key, v=f.value)) for f in facts
    ]
    return Facts(_layout(source, sentences, _FACT_HEADERS), tuple(facts))


def draw_document(source: Source, count: int) -> Facts:
    """A paragraph of `count` facts, each about the last one's name or value."""
    taken: set[tuple[str, str]] = set()
    root = source.name()
    facts: list[Fact] = []
    sentences: list[str] = []
    keys = [root]
    for i in range(count):
        same = bool(facts) and source.chance(0.4)
        key = facts[-1].key if same else source.pick(keys) if source.chance(0.3) else keys[-1]
        fact = _new_fact(source, key, taken, names=i + 1 < count and source.chance(0.6))
        if same:
            sentences.append(f"Its {fact.relation} is {fact.value}.")
        else:
            sentences.append(capital(source.pick(STATEMENTS).format(r=fact.relation, k=key, v=fact.value)))
        facts.append(fact)
        if RELATIONS[fact.relation] == PERSON:
            keys.append(fact.value)
    header = source.pick(("About {k}.", "Report on {k}.", "This is the story of {k}.", "Document: {k}.")).format(k=root)
    return Facts(" ".join([header, *sentences]), tuple(facts))


def draw_news(source: Source, count: int) -> Facts:
    """`count` facts, some of which a later piece of news overrules."""
    old = draw_facts(source, count)
    changed = source.rng.sample(old.facts, source.between(1, max(1, count // 2)))
    new = []
    for fact in changed:
        value = draw_value(source, fact.relation)
        while value == fact.value:
            value = draw_value(source, fact.relation)
        new.append(Fact(fact.key, fact.relation, value))
    sentences = [capital(source.pick(UPDATES).format(r=f.relation, k=f.key, v=f.value)) for f in new]
    header = source.pick(("News:", "Update:", "Since then:", "Latest news:"))
    kept = tuple(f for f in old.facts if f not in changed)
    text = old.text + source.pick((" ", "\n", "\n\n")) + header + " " + " ".join(sentences)
    return Facts(text, kept + tuple(new), tuple(new), frozenset(f.value for f in changed))


_ACTIONS = listed("approve deny flag hold forward return review repair")
_NOUNS = listed("claim order parcel request")
_ITEMS = listed("chair cup box ring door coat bell mask")
_CLAIM_WORDINGS = (
    "{n}: a {m} {i} from {k}.", "a {m} {i} came from {k}. What now?", "{k} sent a {m} {i}. What do we do?",
    "what about the {n} of {k}, a {m} {i}?", "please decide the {n}: {m} {i}, sent by {k}.",
)  # fmt: skip
_RULES = ("For {c}, {a}.", "For {c}, {a}.", "{c}: {a}.", "With {c}, {a}.")
ANYTHING_ELSE = "anything else"


def draw_policy(source: Source) -> Policy:
    """Two to four rules by material, a default, and perhaps an exception by sender."""
    noun = source.pick(_NOUNS)
    materials = source.rng.sample(MATERIALS, source.between(2, 4))
    actions = source.rng.sample(_ACTIONS, len(materials) + 1)
    rules = tuple(zip(materials, actions, strict=False))
    exception = (source.name(), source.pick(_ACTIONS)) if source.chance(0.6) else None
    cases = [*rules, (ANYTHING_ELSE, actions[-1]), *([exception] if exception else [])]
    form = source.pick(_RULES)
    sentences = [capital(form.format(c=case, a=action)) for case, action in cases]
    if exception:
        sentences[-1] = source.pick(("Exception: {s}", "Always: {s}", "Above all: {s}")).format(s=sentences[-1])
    return Policy(_layout(source, sentences, (f"{capital(noun)} rules:",)), noun, rules, actions[-1], exception)


def ask_policy(source: Source, policy: Policy) -> QA:
    """A case to decide; the answer gives the reason, then the rule that applies, and decides last."""
    listed = dict(policy.rules)
    sender = policy.exception[0] if policy.exception and source.chance(0.3) else source.name()
    others = [m for m in MATERIALS if m not in listed]
    material = source.pick(others) if source.chance(0.3) else source.pick(list(listed))
    question = source.ask(_CLAIM_WORDINGS, n=policy.noun, m=material, i=source.pick(_ITEMS), k=sender)
    if policy.exception and sender == policy.exception[0]:
        case, action = policy.exception
    elif material in listed:
        case, action = material, listed[material]
    else:
        case, action = ANYTHING_ELSE, policy.default
    return QA(question, f"The {policy.noun} is {material} from {sender}. For {case}, {action}.", f"{capital(action)}.")


_TOOLS = {
    "weather": ("place", listed("rain sun snow wind fog storm")),
    "price": ("item", NUMBER),
    "stock": ("item", NUMBER),
    "score": ("team", NUMBER),
    "owner": ("item", PERSON),
    "route": ("place", listed("north south east west")),
    "status": ("order", listed("sent lost ready late")),
    "time": ("place", NUMBER),
}


def describe_tools(tools: tuple[tuple[str, str], ...]) -> str:
    """How the chat template writes a list of tools."""
    return "Tools: " + ", ".join(f"{name}({argument})" for name, argument in tools) + "."


def draw_tools(source: Source) -> Tools:
    """Two to four tools."""
    tools = tuple((name, _TOOLS[name][0]) for name in source.rng.sample(tuple(_TOOLS), source.between(2, 4)))
    return Tools(describe_tools(tools), tools)


def ask_tools(source: Source, tools: Tools) -> QA:
    """A question that needs a call; after the tool's answer comes the reply. A missing tool is not known."""
    have = dict(tools.tools)
    name = source.pick(tuple(have)) if source.chance(0.85) else source.pick(tuple(_TOOLS))
    key = source.name()
    question = source.ask(DIRECT, r=f"{name} of", k=key)
    if name not in have:
        return QA(question, unknown_answer(f"The {name} of {key}"), UNKNOWN)
    kind = _TOOLS[name][1]
    result = source.name() if kind == PERSON else str(source.between(10, 99)) if kind == NUMBER else source.pick(kind)
    call = f"call {name}({have[name]}: {key})"
    return QA(question, call, call, bare=True, then=(result, QA("", f"The {name} of {key} is {result}.", f"{result}.")))


def ask_direct(source: Source, block: Facts) -> QA:
    """The value of a key's relation."""
    fact = source.pick(block.focus) if block.focus and source.chance(0.6) else source.pick(block.facts)
    question = source.ask(DIRECT, r=f"{fact.relation} of", k=fact.key)
    return QA(question, fact.sentence(), capital(f"{fact.value}."))


def ask_reversed(source: Source, block: Facts, others: Sequence[Facts] = ()) -> QA | None:
    """The key that has a value; None where no value belongs to just one key, other blocks of the prompt included."""
    every = [f for b in (block, *others) for f in b.facts]
    stale = {v for b in (block, *others) for v in b.stale}
    count = Counter((f.relation, f.value) for f in every)
    unique = [f for f in block.facts if count[f.relation, f.value] == 1 and f.value not in stale]
    if not unique:
        return None
    fact = source.pick(unique)
    question = source.ask(REVERSED, r=fact.relation, v=fact.value)
    return QA(question, f"The one with {fact.relation} {fact.value} is {fact.key}.", f"{fact.key}.")


def ask_two_hop(source: Source, block: Facts) -> QA | None:
    """A relation of a relation of a key; None where no value is itself spoken of."""
    keys: dict[str, list[Fact]] = {}
    for fact in block.facts:
        keys.setdefault(fact.key, []).append(fact)
    chains = [(a, b) for a in block.facts for b in keys.get(a.value, ())]
    if not chains:
        return None
    a, b = source.pick(chains)
    question = source.ask(DIRECT, r=f"{b.relation} of the {a.relation} of", k=a.key)
    end = f"The {b.relation} of the {a.relation} of {a.key} is {b.value}."
    return QA(question, end, capital(f"{b.value}."), steps=f"{a.sentence()} {b.sentence()}")


def ask_unknown(source: Source, blocks: list[Facts]) -> QA:
    """A question of the same kinds that nothing in the prompt answers."""
    facts = [f for block in blocks for f in block.facts]
    if facts and source.chance(0.4):
        key = source.pick(facts).key
        have = {f.relation for f in facts if f.key == key}
        relation = source.pick([r for r in RELATIONS if r not in have])
    else:
        key = source.name()
        relation = source.pick(facts).relation if facts and source.chance(0.5) else source.pick(tuple(RELATIONS))
    if source.chance(0.3):
        value = draw_value(source, relation)
        stale = {v for block in blocks for v in block.stale}
        if value not in stale and not any(f.relation == relation and f.value == value for f in facts):
            question = source.ask(REVERSED, r=relation, v=value)
            return QA(question, unknown_answer(f"The one with {relation} {value}"), UNKNOWN)
    question = source.ask(DIRECT, r=f"{relation} of", k=key)
    return QA(question, unknown_answer(f"The {relation} of {key}"), UNKNOWN)
