"""What comes from a file reaches a terminal and the log as text on one line."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repquant_fx import log
from repquant_fx.cli import main
from repquant_fx.security.escape import printable

HOSTILE = "a\x1b]0;t\x07\nrepquant-fx: wrote b\r\x9b2J\u202ec\ud800\u2028"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("blocks.0.attn.qkv/input → W4A8 ×3", "blocks.0.attn.qkv/input → W4A8 ×3"),
        ("模型 é 🙂\u3000\xa0ü", "模型 é 🙂\u3000\xa0ü"),
        ("", ""),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31m\x00\x7f", r"\x1b[31m\x00\x7f"),
        ("\x85\x9b", r"\x85\x9b"),
        ("\u202e\u2066\u200b\ufeff", r"\u202e\u2066\u200b\ufeff"),
        ("\ud800x\udcff", r"\ud800x\udcff"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("C:\\models\\m.onnx", "C:\\models\\m.onnx"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_bound_counts_what_is_left_out() -> None:
    assert printable("\n" * 10, 4) == r"\n\n\n\n... (6 more characters)"
    assert printable("abcd", 4) == "abcd"


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_text_is_one_line_that_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert len(shown.encode()) >= len(text) and len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in shown)


@pytest.mark.parametrize("say", [log.info, log.warning, lambda message: log.error(message, "InputError", 2)])
def test_a_message_is_one_line(say, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    for form in (log.VERBOSE, log.JSON):
        with log.using(form):
            say(HOSTILE)
        (line,) = capsys.readouterr().err.removesuffix("\n").split("\n")
        assert line.isprintable()
        assert form == log.VERBOSE or json.loads(line)["message"] == HOSTILE


@pytest.mark.parametrize("name", ["\udcff.onnx", "a\n\x1b[2Jb.onnx", "\u202exnno.pt"])
def test_names_of_files(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ([], ["--log-json"]):
        assert main(["inspect", name, *form]) == 2
        lines = capsys.readouterr().err.removesuffix("\n").split("\n")
        assert all(line.isprintable() for line in lines) and (form or len(lines) == 1)
