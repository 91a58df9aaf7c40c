"""The table of what crumb can do: held-out exact match per ability, with and without the prompt it needs.

    python -m jaxbake.smallworld.evaluate [MODEL] [--items 100] [--seed 0] [--json FILE]

Names and question wordings were never seen in training. An answer counts only if the whole greedy reply is right.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxbake.smallworld.items import EVAL_FAMILIES, Item, evaluation_items
from jaxbake.smallworld.score import greedy_matches

TITLES = {
    "facts_1_3": "facts, 1-3 in the prompt",
    "facts_4_6": "facts, 4-6",
    "facts_7_12": "facts, 7-12",
    "facts_13_30": "facts, 13-30",
    "reversed": "facts asked the other way round, 1-12",
    "unknown": 'not in the prompt: "I do not know."',
    "unknown_unprompted": 'no prompt: "I do not know."',
    "persona": "persona",
    "persona_facts": "persona and 5-10 facts",
    "manner_facts": "any manner and 1-8 facts",
    "suffix": "style: a word at the end",
    "prefix": "style: a word at the start",
    "terse": "style: short answers",
    "two_styles": "two of these at once",
    "sum_steps": "three-digit sums, with steps",
    "sum_plain": "three-digit sums, without",
    "two_hop_steps": "two facts joined, with steps",
    "two_hop_plain": "two facts joined, without",
    "policy": "decisions by a policy with exceptions",
    "tool_call": "tool call",
    "tool_answer": "reply after the tool's answer",
    "document": "document of 5-10 linked facts",
    "news": "facts overruled by news",
    "joined": "two or three prompts joined",
    "mixed": "any manner with any content",
    "multi_turn": "the same, fifth turn",
    "told": "facts told by the user",
    "correction": "answers corrected by the user",
    "demonstration": "style shown by examples only",
    "drift": "last of 6-20 turns under one manner",
    "ability": "abilities in the weights",
    "small_talk": "small talk",
    "copy": "repeating words",
}
WITHOUT = ("unknown_unprompted", "demonstration", "ability", "small_talk", "copy", "sum_plain", "told")
"""Families that need no system prompt: there is no second column for them."""


def without_system(item: Item) -> Item:
    """The item without its system prompt."""
    return replace(item, messages=tuple(m for m in item.messages if m["role"] != "system"))


def evaluate(base, n: int = 100, seed: int = 0, families=EVAL_FAMILIES) -> dict[str, dict[str, float]]:
    """Share of right answers per family: {family: {"prompted": x, "bare": y}}; bare is NaN where it says nothing.

    `base` is a `models.base.Base` whose tokenizer and chat template are crumb's.
    """
    items = [item for family in families for item in evaluation_items(family, n, seed)]
    tokenizer = base.tokenizer.backend_tokenizer
    prompted = greedy_matches(base.params, base.config, tokenizer, items)
    bare = greedy_matches(base.params, base.config, tokenizer, [without_system(i) for i in items])
    table = {}
    for family in families:
        mine = [i for i, item in enumerate(items) if item.family == family]
        table[family] = {
            "prompted": float(np.mean([prompted[i] for i in mine])),
            "bare": math.nan if family in WITHOUT else float(np.mean([bare[i] for i in mine])),
        }
    return table


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The table for the model card."""
    lines = ["| | prompted | without the prompt |", "|---|---|---|"]
    for family, row in table.items():
        bare = "" if math.isnan(row["bare"]) else f"{row['bare']:.3f}"
        lines.append(f"| {TITLES[family]} | {row['prompted']:.3f} | {bare} |")
    return "\n".join(lines)


def main() -> None:
    from jaxbake.models.base import load

    parser = argparse.ArgumentParser(description="Measure crumb on the held-out side of its small world.")
    parser.add_argument("model", nargs="?", default="crumb", help="crumb, or a folder exported from a training run")
    parser.add_argument("--items", type=int, default=100, help="items per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    table = evaluate(load(options.model), options.items, options.seed)
    print(markdown(table))
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
