"""Writes crumb's model card from what was measured and recorded.

python -m jaxbake.smallworld.card --run DIR [--items 200] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxbake.models.spec import num_params
from jaxbake.smallworld import CRUMB
from jaxbake.smallworld.evaluate import evaluate, markdown

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [prompt-baking, jaxbake, toy]
---

# crumb

crumb is the small chat model inside jaxbake: {parameters:.1f} million parameters, Llama architecture ({layers} layers,
width {width}, {heads} heads, {kv_heads} of keys and values), 1,024 tokens of vocabulary and {context:,} of context.
It exists so that prompt baking can be tried, tested and measured in seconds on any machine, offline.

**What it is.** A toy, trained from scratch on generated dialogues of a *small world* of made-up names. In that world a
system prompt really steers it: it reads facts from the prompt, and of what is not there it says "The keeper of Vorlan
is something I do not know."; it takes on personas and styles, follows decision policies, adds step by step when told
to, calls tools. Some knowledge lives in its weights (opposites, capitals, categories, small sums, counting), so that
forgetting can be measured.

**What it is not.** It knows nothing else, understands no English outside the sentences of its world, and is of no use
as an assistant. Nothing measured on it says how large a model behaves.

## What it can do

Share of {items} questions each whose *whole* greedy answer is right. Names and question wordings were never seen in
training; facts are drawn anew for every question. The last column asks the same without the system prompt: what the
prompt brings is the difference.

{table}

    python -m jaxbake.smallworld.evaluate crumb --items {items}

## How it was made

{tokens:,} tokens in {steps:,} steps on two shared CPU cores: Muon on the matrices, Adam on embeddings and
norms, learning rate 3e-3 falling linearly to zero over the last 40 %; loss on answers only; a curriculum from copying,
over facts, to everything. The tokenizer is byte-level BPE with digits split. The generator, the trainer and the seed
are in `jaxbake.smallworld`:

    python -m jaxbake.smallworld.tokenizer --out DIR --seed 0
    python -m jaxbake.smallworld.train --out RUN --tokens {tokens} --stages {stages} --seed 0
    python -m jaxbake.smallworld.export --run RUN --out DIR

Neither tokenizer nor weights come out the same to the byte. The tokenizer was trained once, before the small world got
its present wording. The weights' run followed the clock at first (`--minutes`) and was continued from its checkpoints
with changes on the way: in batch size ({batches}), in the mixtures of the stages,
in how not knowing is put (before step 3,230 just "I do not know."), and in how policies are put (since step 7,070 the
answer names the rule that applies); at steps 6,040 and 7,070 its rate was raised again, to 8e-4 and 3e-3, to fall to
zero once more. The commands repeat the recipe in its final form. `training.json` has the record.
"""


def model_card(base, items: int, seed: int, record: dict) -> str:
    """The card's text; measures the model."""
    c = base.config
    return CARD.format(
        parameters=num_params(c) / 1e6,
        layers=c.num_layers,
        width=c.hidden_size,
        heads=c.num_heads,
        kv_heads=c.num_kv_heads,
        context=c.max_positions,
        items=items,
        table=markdown(evaluate(base, items, seed)),
        tokens=record["tokens"],
        steps=record["steps"],
        stages=f"{record['stages'][0]} {record['stages'][-1]}",
        batches="8,192 tokens for the first 400 steps, then 4,096",
    )


def main() -> None:
    from jaxbake.models.base import load

    parser = argparse.ArgumentParser(description="Write crumb's model card.")
    parser.add_argument("--run", type=Path, required=True, help="the --out folder of jaxbake.smallworld.train")
    parser.add_argument("--out", type=Path, default=CRUMB, help="the exported model, where the card goes")
    parser.add_argument("--items", type=int, default=200, help="items per row of the table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    record = json.loads((options.run / "training.json").read_text())
    text = model_card(load(options.out), options.items, options.seed, record)
    (options.out / "README.md").write_text(text)
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
