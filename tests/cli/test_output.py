"""How a command speaks: --quiet, --verbose, --log-json; stdout for the result alone; exit codes in the help."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from repquant_fx import log, progress
from repquant_fx.cli import EXIT_CODES, main

FAST = ["--no-gptq", "--no-correction", "--clipping", "none", "--activations", "minmax", "--weights", "minmax", "--softmax-scale", "percentile"]
STAGES = ["load", "capture", "calibration data", "quantize", "export", "check"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def compile_it(place: Path, out: Path, *switches: str) -> int:
    return main(["compile", str(place / "model.pt2"), "--calib", str(place / "tokens.npy"), "--out", str(out), *FAST, *switches])


def events(text: str) -> list[dict[str, Any]]:
    """Every line is one JSON object with an event and a time."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", e["time"]) for e in found)
    return found


def test_quiet_says_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_it(place, tmp_path / "m.onnx", "--quiet") == 0
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "") and (tmp_path / "m.onnx").exists()
    assert compile_it(place, tmp_path / "m.onnx", "--quiet") == 2
    assert "error: " in capsys.readouterr().err


def test_quiet_keeps_warnings(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(place / "weights.safetensors"), "--out", str(tmp_path / "m.onnx"), "--calib-samples", "8", "--quiet", *FAST]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("repquant-fx: warning: no calibration data")


def test_verbose_tells_the_stages(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_it(place, tmp_path / "m.onnx", "--verbose") == 0
    found = capsys.readouterr()
    assert found.out == "" and re.findall(r"^([a-z ]+): \d+\.\d\d s$", found.err, re.M) == STAGES and "wrote " in found.err


def test_json_events(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_it(place, tmp_path / "m.onnx", "--log-json", "--json") == 0
    found = capsys.readouterr()
    told = events(found.err)
    assert [e["stage"] for e in told if e["event"] == "stage_started"] == [e["stage"] for e in told if e["event"] == "stage_finished"] == STAGES
    assert all(e["seconds"] >= 0 for e in told if e["event"] == "stage_finished")
    result = told[-1]
    assert result["event"] == "result" and result["out"] == str(tmp_path / "m.onnx") and result["bits"] == "W8A8" and "layers" not in result
    assert json.loads(found.out)["file_bytes"] == result["file_bytes"] == (tmp_path / "m.onnx").stat().st_size


@pytest.mark.parametrize("arguments, kind, code", [
    (["compile", "missing.pt", "--out", "m.onnx"], "ModelFileError", 2), (["compile", "m.pt"], "InputError", 2),
    (["evaluate", "m.onnx", "--data", "none"], "InputError", 2)])
def test_errors_are_events_too(arguments: list[str], kind: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--log-json"]) == code
    found = capsys.readouterr()
    last = events(found.err)[-1]
    assert (last["event"], last["kind"], last["exit_code"]) == ("error", kind, code) and last["message"] and found.out == ""


def test_interruption_and_bugs_have_their_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import repquant_fx.compiler

    for error, code in ((KeyboardInterrupt(), 130), (ZeroDivisionError("x"), 1)):
        def fail(*args: object, raised: BaseException = error, **kwargs: object) -> None:
            raise raised

        monkeypatch.setattr(repquant_fx.compiler, "compile", fail)
        assert main(["compile", "m.pt", "--out", str(tmp_path / "m.onnx"), "--log-json"]) == code
        assert events(capsys.readouterr().err)[-1]["exit_code"] == code


@pytest.mark.parametrize("switches, shown", [([], True), (["--verbose"], True), (["--quiet"], False), (["--log-json"], False)])
def test_progress_bars_on_a_terminal_only(switches: list[str], shown: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert compile_it(place, tmp_path / "m.onnx", "--no-check", *switches) == 0
    assert ("quantize" in sys.stderr.getvalue() and "it/s" in sys.stderr.getvalue()) == shown  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert compile_it(place, tmp_path / "m.onnx", "--no-check", "--force", *switches) == 0
    assert "it/s" not in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_one_form_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "m.pt", "--out", "m.onnx", "--quiet", "--verbose"]) == 2 and "not allowed with" in capsys.readouterr().err


def test_a_library_is_silent_and_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    log.stage("load")
    log.info("x")
    log.finish()
    assert capsys.readouterr() == ("", "")
    before = progress.enabled
    with log.using(log.JSON):
        assert not progress.enabled
    assert progress.enabled == before


@pytest.mark.parametrize("command", [[], ["compile"], ["evaluate"], ["inspect"]])
def test_exit_codes_are_documented(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0 and " ".join(EXIT_CODES.split()) in " ".join(capsys.readouterr().out.split())
