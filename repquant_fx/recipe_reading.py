"""YAML and TOML as data, strictly: what a recipe has no use for, such as aliases and a key that is set twice, is an
error.
"""

from __future__ import annotations

import re
from typing import Any

from repquant_fx.errors import RecipeError

MOST_BYTES = 1 << 18  # of a file; a rule for each of a thousand layers takes a third of it
_DEEPEST = 8
_DOTTED = re.compile(rf'(?<![\w"-])([\w"-]+[ \t]*\.[ \t]*){{{_DEEPEST}}}')


def parse(text: str, suffix: str) -> Any:
    """The data of a document; `suffix` says of which kind, such as `.yaml`.

    Raises:
        RecipeError: it holds what no recipe does. What is no YAML or TOML at all raises what its parser does.
    """
    if suffix == ".toml":
        try:
            import tomllib
        except ModuleNotFoundError:  # Python 3.10
            import tomli as tomllib  # type: ignore[import-not-found,no-redef]
        # the memory it takes grows with the square of the length
        if _DOTTED.search(re.sub(r'"[^"\n]*"|\'[^\'\n]*\'', '""', text)):
            raise RecipeError(f"a recipe has no key of more than {_DEEPEST} parts")
        return tomllib.loads(text)
    if suffix in (".yaml", ".yml"):
        import yaml

        depth = 0
        keys: list[set[str] | None] = []  # of the open collections; None of a list
        expects_key: list[bool] = []
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            _note_key(event, keys, expects_key)
            if isinstance(event, yaml.AliasEvent):  # nine lines of them can stand for billions of settings
                raise RecipeError("a recipe has no aliases (*name); write the settings out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise RecipeError(f"a recipe is not nested {depth} levels deep")
        return yaml.safe_load(text)
    raise RecipeError(f"a recipe is .yaml, .yml, .toml, or an exported .onnx; found {suffix or 'no suffix'!r}")


def _note_key(event: Any, keys: list[set[str] | None], expects_key: list[bool]) -> None:
    """Follow a YAML document; a key that a table has already is an error (YAML itself would let the last one win)."""
    import yaml

    if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
        keys.pop()
        expects_key.pop()
        return
    if not isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
        return
    if keys and keys[-1] is not None:
        if expects_key[-1] and isinstance(event, yaml.ScalarEvent):
            if event.value in keys[-1]:
                where = "" if event.start_mark is None else f"line {event.start_mark.line + 1}: "
                raise RecipeError(f"{where}{event.value!r} is set twice")
            keys[-1].add(event.value)
        expects_key[-1] = not expects_key[-1]
    if isinstance(event, yaml.CollectionStartEvent):
        keys.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
        expects_key.append(True)
