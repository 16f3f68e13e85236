"""Recipes as text: commented YAML or TOML, and a JSON schema (draft 2020-12). Words and limits are those of the
dataclass itself.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from dataclasses import MISSING, fields
from typing import Any

from repquant_fx.recipe import LayerRule, Recipe
from repquant_fx.recipe_settings import settings_of

FORMATS = ("yaml", "toml")
WIDTH = 100  # of comments
_EXAMPLE = (
    '{match: "blocks.*.mlp.fc2", wbits: 8, abits: 8}',
    '[[layers]]\nmatch = "blocks.*.mlp.fc2"\nwbits = 8\nabits = 8',
)


def write(recipe: Recipe, form: str = "yaml") -> str:
    """A recipe with a comment on every setting; `Recipe.from_file` reads an equal recipe back.

    Args:
        form: `yaml` or `toml`.
    """
    yaml, words = form == "yaml", descriptions(Recipe)
    data = recipe.to_dict()
    rules = data.pop("layers")
    lines = ["# A recipe of repquant-fx; a setting that is left out keeps its default.",
             "# `repquant-fx recipe schema` prints the JSON schema of this file.", ""]
    for name, value in data.items():
        lines += [*_comment(words[name] + _allowed(name)), f"{name}{': ' if yaml else ' = '}{_value(value)}", ""]
    lines += _comment(words["layers"] + " The last rule that matches wins, setting by setting. For example:")
    lines += [f"#   {line}" for line in (f"- {_EXAMPLE[0]}" if yaml else _EXAMPLE[1]).splitlines()]
    if yaml:
        lines += ["layers:" + (" []" if not rules else ""), *(f"  - {{{_pairs(rule, ': ')}}}" for rule in rules)]
    else:
        for rule in rules:
            lines += ["", "[[layers]]", *(f"{key} = {_value(value)}" for key, value in rule.items())]
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors and pipelines. It accepts what `Recipe.from_dict` accepts."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "repquant-fx recipe", **_object(Recipe)}


def descriptions(cls: type) -> dict[str, str]:
    """What the `Attributes:` section of a dataclass's docstring says of each field."""
    text = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    described: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + re.split(r"\n(?=\S)", text)[0])[1:]:
        names, _, words = entry.strip().partition(":")
        for name in names.split(","):
            described[name.strip()] = " ".join(words.split())
    return described


def _object(cls: Any) -> dict[str, Any]:
    words = descriptions(cls)
    properties = {f.name: {**_property(f.name, cls, f.default), "description": words[f.name]} for f in fields(cls)}
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    for f in fields(cls):
        if f.default is not MISSING and f.default is not None:
            properties[f.name]["default"] = list(f.default) if isinstance(f.default, tuple) else f.default
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def _property(name: str, cls: Any, default: Any) -> dict[str, Any]:
    """A property beyond its description; a setting of a rule may be null, which leaves it out."""
    limits = settings_of(cls).get(name)
    if limits is None:
        return {"type": "array", "items": _object(LayerRule)} if name == "layers" else {"type": "string"}
    property_ = limits.schema()
    if default is not None:
        return property_
    if "anyOf" in property_:
        return {"anyOf": [*property_["anyOf"], {"type": "null"}]}
    return {**property_, "type": [property_["type"], "null"]}


def _allowed(name: str) -> str:
    limits = settings_of(Recipe).get(name)
    return f" {limits.allowed()}".rstrip() if limits is not None else ""


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )


def _pairs(rule: dict[str, Any], separator: str) -> str:
    return ", ".join(f"{key}{separator}{_value(value)}" for key, value in rule.items())


def _value(value: Any) -> str:
    """A scalar or a list of strings, as YAML 1.1 and TOML both read it: JSON, but an exponent needs a decimal point
    before it.
    """
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text
