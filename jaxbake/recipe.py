"""Recipes: one bake from start to end as YAML, read strictly into `config.Recipe` and written back."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from jaxbake.config import BakeConfig, Recipe
from jaxbake.data.stimuli import load_prompts
from jaxbake.errors import JaxbakeError, did_you_mean


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with overrides such as "bake.lora.rank=8" put in its place (values are YAML).

    Raises JaxbakeError naming the file and the dotted field: not YAML, a key given twice or unknown, a wrong type,
    a prompt that is missing, empty or given twice. Paths inside stay as written, relative to the recipe's folder.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JaxbakeError(f"{path}: no such recipe; the repository's configs/ folder holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JaxbakeError(f"{path}: cannot be read as text ({_reason(error)})") from None
    recipe = parse_recipe(text, overrides, source=str(path))
    read_prompts(recipe, path.parent)
    return recipe


def parse_recipe(text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """As `load_recipe`, from YAML text; files it names are not looked at. `source` stands in front of errors."""
    data = _read_yaml(text, source)
    if not isinstance(data, dict):
        raise JaxbakeError(f"{source}: a recipe is a mapping of fields such as 'name: pirate', found {_kind(data)}")
    for override in overrides:
        _override(data, override)
    data = _normalise(Recipe, data, (), source)
    return _validate(data, source)


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `parse_recipe` reads back to an equal one."""
    return yaml.dump(_plain(dataclasses.asdict(recipe)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_prompts(recipe: Recipe, root: str | Path) -> list[tuple[str, list[str]]]:
    """The prompts with user turns of their own (none but in a `prompts_file`). Raises JaxbakeError as `read_prompt`."""
    if recipe.prompts_file is not None:
        return load_prompts(Path(root) / recipe.prompts_file)
    return [(read_prompt(recipe, root), [])]


def read_prompt(recipe: Recipe, root: str | Path) -> str:
    """The prompt's text; `prompt_file` is looked up in `root`, the recipe's folder. Raises JaxbakeError if empty."""
    if recipe.prompt_file is None:
        return recipe.prompt.strip()
    path = Path(root) / recipe.prompt_file
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise JaxbakeError(f"prompt_file: '{path}' cannot be read as text ({_reason(error)})") from None
    if not text:
        raise JaxbakeError(f"prompt_file: '{path}' is empty; it should hold the prompt to bake")
    return text


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error instead of a silent overwrite."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that writes texts of several lines as blocks."""


def _dump_text(dumper, text: str):
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _dump_text)


def _read_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise JaxbakeError(f"{source}:{where} {error.problem}") from None
    except yaml.YAMLError as error:
        raise JaxbakeError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def _plain(value: Any) -> Any:
    """Tuples as lists, which is all YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _override(data: dict, override: str) -> None:
    """Puts "a.b=c" into the nested mapping."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise JaxbakeError(f"--set {override}: write it as field=value, such as bake.train.steps=100")
    for depth, key in enumerate(keys[:-1], 1):
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise JaxbakeError(f"--set {override}: {'.'.join(keys[:depth])} is {_kind(data)}, it has no fields")
    data[keys[-1]] = _read_yaml(text, f"--set {override}")


# Checking against the dataclasses


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@cache
def _all_fields(kind: type = Recipe, path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], ...]:
    """Path of every field a recipe may have."""
    found = []
    for name, hint in _hints(kind).items():
        found.append((*path, name))
        if dataclasses.is_dataclass(hint):
            found.extend(_all_fields(hint, (*path, name)))
    return tuple(found)


def _normalise(kind: type, data: dict, path: tuple[str, ...], source: str) -> dict:
    """Refuses unknown keys; an empty section takes its defaults, and a single value stands for a list of one."""
    hints = _hints(kind)
    result = {}
    for key, value in data.items():
        dotted = ".".join((*path, key))
        if key not in hints:
            raise JaxbakeError(f"{source}: unknown field '{dotted}'; {_nearest(key, hints, path)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if value is None:
                continue
            if isinstance(value, dict):
                value = _normalise(hint, value, (*path, key), source)
        elif typing.get_origin(hint) is tuple and isinstance(value, (str, int, float)):
            value = [value]
        if isinstance(value, bool) and not _accepts_bool(hint):  # pydantic would take yes for 1
            raise JaxbakeError(f"{source}: {dotted}: should be {_describe(hint)}, not {str(value).lower()}")
        result[key] = value
    return result


def _nearest(key: str, known: dict, path: tuple[str, ...]) -> str:
    """The closest field of the same section, else a field of that name in another one."""
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"did you mean '{'.'.join((*path, close[0]))}'?"
    elsewhere = [field for field in _all_fields() if difflib.get_close_matches(key, field[-1:], cutoff=0.8)]
    return f"did you mean '{'.'.join(elsewhere[0])}'?" if elsewhere else did_you_mean(key, known)


def _options(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        yield from typing.get_args(hint)
    else:
        yield hint


def _accepts_bool(hint: Any) -> bool:
    return bool in _options(hint)


def _describe(hint: Any) -> str:
    """A type in words: "a whole number", "one of 'linear', 'cosine'", "a list of texts"."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    plural = {int: "whole numbers", float: "numbers", str: "texts"}
    said = []
    for option in _options(hint):
        if dataclasses.is_dataclass(option):
            said.append("a section with " + ", ".join(_hints(option)))
        elif typing.get_origin(option) is typing.Literal:
            choices = [f"'{choice}'" for choice in typing.get_args(option)]
            said.append(choices[0] if len(choices) == 1 else "one of " + ", ".join(choices))
        elif typing.get_origin(option) is tuple:
            said.append(f"a list of {plural[typing.get_args(option)[0]]}")
        else:
            said.append(words[option])
    return " or ".join(said)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def _validate(data: dict, source: str) -> Recipe:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Recipe).validate_python(data)
    except ValidationError as error:
        raise JaxbakeError(f"{source}: " + "; ".join(dict.fromkeys(map(_explain, error.errors())))) from None
    except JaxbakeError as error:  # a value out of range: the dataclass says so with its own section
        section = str(error).split(".")[0].split(":")[0]
        prefix = "bake." if section in _hints(BakeConfig) else ""
        raise JaxbakeError(f"{source}: {prefix}{error}") from None


def _explain(error: dict) -> str:
    """One of pydantic's errors as "field: what is wrong, what would be right"."""
    path, hint = [], Recipe
    for part in error["loc"]:
        if dataclasses.is_dataclass(hint) and part in _hints(hint):
            path.append(part)
            hint = _hints(hint)[part]
    dotted = ".".join(path)
    if error["type"] == "missing":
        return f"{dotted}: is missing, should be {_describe(hint)}"
    value = error["input"]
    shown = repr(value) if isinstance(value, (str, int, float)) else _kind(value)
    return f"{dotted}: should be {_describe(hint)}, not {shown}"
