"""How much longer a tokenizer makes a text, from its `tokenizer.json`: each of many rules can double it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from repquant_fx.errors import InputError, first_line, is_failure

_MOST_GROWTH = 1000  # times as long; composed characters alone make 18 of one
_MOST_STEPS, _MOST_LETTERS, _MOST_ADDED = 200, 10_000, 10_000
_PROBE = "".join(map(chr, range(32, 127))) + "  aa  bb  the red fox, 1234567890 ...\n\tÀé ß 中文 ﷺ ① 👍🏽 "
_OTHERS = ("vocab", "merges", "max_input_chars_per_word")
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")


def check_growth(description: Any, where: str) -> None:
    """Refuse a tokenizer that multiplies what it reads, or whose rules are longer than any tokenizer's.

    Args:
        description: what a `tokenizer.json` holds.
        where: its file, for messages.

    Raises:
        InputError: it does; the message names the rule.
    """
    if not isinstance(description, Mapping):
        raise InputError(f"{where} does not hold an object")
    for part in _PARTS:
        _check_entries(description.get(part), f"{where}: its {part}")
    steps = list(_steps(description.get("normalizer"), "normalizers"))
    _check_normalizer(steps, f"{where}: its normalizer")
    split = list(_steps(description.get("pre_tokenizer"), "pretokenizers"))
    if (growth := math.prod(map(_bound, split))) > _MOST_GROWTH:
        raise InputError(f"{where}: its pre_tokenizer makes a text {growth:g} times as long")
    times, added = 1, 0
    for step in _steps(description.get("post_processor"), "processors"):
        often, more = _template(step)
        times, added = times * often, added + more
        if times > _MOST_GROWTH or added > _MOST_ADDED:
            raise InputError(f"{where}: its post_processor repeats a text {times} times and adds {added} tokens")
    model = description.get("model")
    model = model if isinstance(model, Mapping) else {}
    affixes = {name: value for name, value in model.items() if name not in _OTHERS}  # put before or after each piece
    _check_entries(affixes, f"{where}: its model")
    longest = model.get("max_input_chars_per_word")
    if isinstance(longest, int) and longest > _MOST_LETTERS:
        raise InputError(
            f"{where}: max_input_chars_per_word = {longest} takes time without end; no word has more than "
            f"{_MOST_LETTERS} letters"
        )


def _steps(part: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a part, sequences opened."""
    if not isinstance(part, Mapping):
        return
    if part.get("type") == "Sequence":
        for each in part.get(inner) or ():
            yield from _steps(each, inner)
    else:
        yield part


def _check_entries(part: Any, where: str) -> None:
    """The lengths of a part: its rules, the patterns and texts in them, its numbers."""
    waiting, count = [part], 0
    while waiting:
        item = waiting.pop()
        count += isinstance(item, dict) and "type" in item
        if isinstance(item, dict):
            waiting.extend(each for name, each in item.items() if name != "precompiled_charsmap")
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, str) and len(item) > _MOST_LETTERS:
            raise InputError(f"{where} has a rule of {len(item)} letters, which begins {item[:40]!r}")
        elif isinstance(item, int) and abs(item) > 1_000_000:
            raise InputError(f"{where} asks for a length of {str(item)[:40]}")
        if count > _MOST_STEPS:
            raise InputError(f"{where} has more than {_MOST_STEPS} rules")


def _check_normalizer(steps: list[Mapping[str, Any]], where: str) -> None:
    """By what the rules say, and step by step on a short text: a step that would be without end is never reached."""
    from tokenizers import Tokenizer

    bound, text = 1.0, _PROBE
    for step in steps:
        bound *= _bound(step)
        if bound <= _MOST_GROWTH:
            alone = {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": step,
                "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
            }
            try:
                normalizer: Any = Tokenizer.from_str(json.dumps(alone)).normalizer
                text = normalizer.normalize_str(text) if normalizer is not None else text
            except BaseException as error:  # a panic of its library is no Exception
                if not is_failure(error):
                    raise
                raise InputError(f"{where} fails at {str(step.get('type'))[:40]}: {first_line(error)}") from error
        if bound > _MOST_GROWTH or len(text) > _MOST_GROWTH * len(_PROBE):
            raise InputError(
                f"{where} makes a text over {_MOST_GROWTH} times as long, at the rule {json.dumps(dict(step))[:80]}"
            )


def _bound(step: Mapping[str, Any]) -> float:
    """How many letters a step makes of one, as far as its entries tell."""
    kind, content = step.get("type"), step.get("content")
    if kind == "Replace" and isinstance(content, str):
        pattern = step.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, Mapping) else None
        return max(1.0, len(content) / len(plain)) if isinstance(plain, str) and plain else max(1, len(content))
    if kind == "ByteLevel":  # a letter of several bytes becomes as many letters of two bytes
        return 2.0
    if kind == "Precompiled" and isinstance(step.get("precompiled_charsmap"), str):
        try:
            return _longest_replacement(base64.b64decode(step["precompiled_charsmap"]))
        except ValueError:
            return 1.0  # whoever reads it says what is wrong with it
    return 1.0


def check_replacements(table: bytes, where: str) -> None:
    """Refuse a table of SentencePiece's normalization that multiplies what it reads.

    Raises:
        InputError: it does.
    """
    if (longest := _longest_replacement(table)) > _MOST_GROWTH:
        raise InputError(f"{where} replaces a letter by {longest}; more than {_MOST_GROWTH} is no normalization")


def _longest_replacement(table: bytes) -> int:
    """Of SentencePiece's table: the size of a trie, the trie, and the texts that it leads to, each ended by a zero."""
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1, max((len(text.decode("utf-8", "ignore")) for text in texts.split(b"\0")), default=1))


def _template(step: Mapping[str, Any]) -> tuple[int, int]:
    """(how often it takes one text, tokens that it adds)."""
    known = step.get("special_tokens")
    lengths = (
        {name: len(token.get("ids") or ()) for name, token in known.items() if isinstance(token, Mapping)}
        if isinstance(known, Mapping)
        else {}
    )
    times, added = 1, 0
    for form in ("single", "pair"):
        items = (
            [item for item in step.get(form) or () if isinstance(item, Mapping)]
            if isinstance(step.get(form), list)
            else []
        )
        names = [item["Sequence"].get("id") for item in items if isinstance(item.get("Sequence"), Mapping)]
        times = max([times, *(names.count(name) for name in ("A", "B"))])
        tokens = (item["SpecialToken"].get("id") for item in items if isinstance(item.get("SpecialToken"), Mapping))
        added = max(added, sum(lengths.get(token, 1) for token in tokens if isinstance(token, str)))
    return times, added
