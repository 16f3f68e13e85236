"""SentencePiece models (`tokenizer.model`, `spiece.model`, `*.spm`) of a directory, judged before a library reads them.

Such a file is a protobuf: a list of fields, each with a number, a type and, for what interests here, a length. The
fields are walked, nothing is built: lengths that lead beyond the end, more pieces than any vocabulary has, and
replacements that multiply a text are refused. A file of that name can also be a table of tiktoken: one token in base64
and its rank a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from repquant_fx.errors import InputError
from repquant_fx.frontends.tokenizer_growth import check_replacements

SUFFIXES = (".model", ".spm")
_MOST_BYTES = 64 << 20  # the largest vocabularies have a tenth
_MOST_PIECES, _LONGEST_PIECE, _LONGEST_TEXT = 2_000_000, 10_000, 1_000_000
_PIECES, _NORMALIZERS, _CHARSMAP = 1, (3, 5), 2  # numbers of fields, of the model and of a normalizer
_TIKTOKEN = re.compile(rb"([A-Za-z0-9+/]+={0,2} \d{1,9}\r?\n)+")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Field = tuple[int, bytes]  # number, content; empty for one that is a number


def check_sentencepiece(data: bytes, where: str) -> None:
    """Refuse what is neither a sound SentencePiece model nor a table of tokens.

    Args:
        data: the content of the file.
        where: its name, for messages.

    Raises:
        InputError: it is not, or is beyond measure.
    """
    if len(data) > _MOST_BYTES:
        raise InputError(f"{where} has {len(data)} bytes, which no vocabulary has")
    if _TIKTOKEN.fullmatch(data if data.endswith(b"\n") else data + b"\n"):
        return
    pieces = 0
    try:
        for number, content in _fields(data):
            if number == _PIECES:
                pieces += 1
                if len(content) > _LONGEST_PIECE:
                    raise ValueError(f"a piece has {len(content)} bytes")
            elif number in _NORMALIZERS:
                for inner, table in _fields(content):
                    if inner == _CHARSMAP:
                        check_replacements(table, where)
            elif len(content) > _LONGEST_TEXT:
                raise ValueError(f"its field {number} has {len(content)} bytes")
            if pieces > _MOST_PIECES:
                raise ValueError(f"it has more than {_MOST_PIECES} pieces")
        if not pieces:
            raise ValueError("it has no pieces")
    except ValueError as error:
        raise InputError(f"{where} is no sound SentencePiece model: {error}") from error


def _fields(data: bytes) -> Iterator[Field]:
    """The fields of a message, in order.

    Raises:
        ValueError: they do not end where the message ends, or are of a type that is none.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        content = b""
        if kind == _VARINT:
            _, place = _varint(data, place)
        elif kind == _BYTES:
            length, place = _varint(data, place)
            content = data[place:place + length]
            place += length
        elif kind in (_FIXED32, _FIXED64):
            place += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of the type {kind}")
        if place > len(data):
            raise ValueError("a field leads beyond its end")
        yield number, content


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """(a number of up to ten bytes, the place behind it)."""
    value = 0
    for index, byte in enumerate(data[place:place + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, place + index + 1
    raise ValueError("a number does not end")
