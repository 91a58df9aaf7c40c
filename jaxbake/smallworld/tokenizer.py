"""crumb's tokenizer: byte-level BPE of 1,024 tokens, digits split, trained on the small world; and its chat template.

python -m jaxbake.smallworld.tokenizer --out DIR [--seed 0]

The tokenizer that ships was trained once, on the small world as it was worded then; the weights belong to it, so it
stays while the wording moves on.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from jaxbake.smallworld.curriculum import STAGES, draw_dialogue

PAD, END, SYSTEM, USER, ASSISTANT, TOOL = SPECIAL = (
    "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
)  # fmt: skip
VOCAB = 1024
DIALOGUES = 40_000

_WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- if tools %}
{%- set listed = namespace(text='') %}
{%- for tool in tools %}
{%- set f = tool.function if tool.function is defined else tool %}
{%- set listed.text = listed.text + (', ' if listed.text else '') + f.name + '(' \
+ (f.parameters.properties.keys() | join(', ')) + ')' %}
{%- endfor %}
{%- set tools_text = 'Tools: ' + listed.text + '.' %}
{%- endif %}
{%- if tools and (not messages or messages[0].role != 'system') %}{{ '<|system|>' + tools_text + '<|end|>' }}{% endif %}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role ' + message.role) }}
{%- endif %}
{{- '<|' + message.role + '|>' }}
{%- if message.role == 'assistant' and message.tool_calls %}
{%- for call in message.tool_calls %}
{%- set f = call.function if call.function is defined else call %}
{{- ('; ' if not loop.first else '') + 'call ' + f.name + '(' }}
{%- for name, value in f.arguments.items() %}\
{{ (', ' if not loop.first else '') + name + ': ' + value | string }}{% endfor %}
{{- ')' }}
{%- endfor %}
{%- else %}
{{- message.content | trim }}
{%- endif %}
{%- if loop.first and tools and message.role == 'system' %}{{ ' ' + tools_text }}{% endif %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""


def corpus(seed: int, dialogues: int = DIALOGUES) -> list[str]:
    """Texts to learn the merges from: the contents of dialogues of every stage, training names only."""
    rng = random.Random(seed)
    stages = len(STAGES)
    return [m["content"] for i in range(dialogues) for m in draw_dialogue(rng, i % stages).messages]


def train_tokenizer(seed: int = 0, dialogues: int = DIALOGUES):
    """A `tokenizers.Tokenizer`. A space is put before every text and taken off again, so that a word is the same token
    everywhere."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, dialogues), trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train crumb's tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    save_tokenizer(train_tokenizer(options.seed), options.out, 1024)


if __name__ == "__main__":
    main()
