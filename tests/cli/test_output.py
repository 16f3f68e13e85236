"""How a command speaks: --quiet, --verbose, --log-json; stdout for the result alone; exit codes in the help."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import FAST

from repquant_fx import log, progress
from repquant_fx.cli import EXIT_CODES, main
from repquant_fx.frontends.tasks import TASKS

BAR = re.compile(r"quantize .*[━╸╺ -]+.*\d+/\d+")
STAGES = ["load", "capture", "calibration data", "quantize", "export", "check"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def compile_it(place: Path, out: Path, *switches: str) -> int:
    return main(
        ["compile", str(place / "model.pt2"), "--calib", str(place / "tokens.npy"), "--out", str(out), *FAST, *switches]
    )


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
    assert (
        main(
            [
                "compile",
                str(place / "weights.safetensors"),
                "--out",
                str(tmp_path / "m.onnx"),
                "--calib-samples",
                "8",
                "--quiet",
                *FAST,
            ]
        )
        == 0
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("repquant-fx: warning: no calibration data")


def test_verbose_tells_the_stages(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_it(place, tmp_path / "m.onnx", "--verbose") == 0
    found = capsys.readouterr()
    assert (
        found.out == "" and re.findall(r"^([a-z ]+): \d+\.\d\d s$", found.err, re.M) == STAGES and "wrote " in found.err
        and "the file takes about " in found.err
    )


def test_json_events(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_it(place, tmp_path / "m.onnx", "--log-json", "--json") == 0
    found = capsys.readouterr()
    told = events(found.err)
    assert (
        [e["stage"] for e in told if e["event"] == "stage_started"]
        == [e["stage"] for e in told if e["event"] == "stage_finished"]
        == STAGES
    )
    assert all(e["seconds"] >= 0 for e in told if e["event"] == "stage_finished")
    result = told[-1]
    assert (
        result["event"] == "result"
        and result["out"] == str(tmp_path / "m.onnx")
        and result["bits"] == "W8A8"
        and "layers" not in result
    )
    assert json.loads(found.out)["file_bytes"] == result["file_bytes"] == (tmp_path / "m.onnx").stat().st_size


@pytest.mark.parametrize("arguments, kind, code", [
    (["compile", "missing.pt", "--out", "m.onnx"], "ModelFileError", 2), (["compile", "m.pt"], "InputError", 2),
    (["evaluate", "m.onnx", "--data", "none"], "InputError", 2)])
def test_errors_are_events_too(
    arguments: list[str],
    kind: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--log-json"]) == code
    found = capsys.readouterr()
    last = events(found.err)[-1]
    assert (
        (last["event"], last["kind"], last["exit_code"]) == ("error", kind, code)
        and last["message"]
        and found.out == ""
    )


def test_interruption_and_bugs_have_their_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import repquant_fx.compiler

    for error, code in ((KeyboardInterrupt(), 130), (ZeroDivisionError("x"), 1)):
        def fail(*args: object, raised: BaseException = error, **kwargs: object) -> None:
            raise raised

        monkeypatch.setattr(repquant_fx.compiler, "compile_model", fail)
        assert main(["compile", "m.pt", "--out", str(tmp_path / "m.onnx"), "--log-json"]) == code
        assert events(capsys.readouterr().err)[-1]["exit_code"] == code


@pytest.mark.parametrize(
    "switches, shown", [([], True), (["--verbose"], True), (["--quiet"], False), (["--log-json"], False)]
)
def test_progress_bars_on_a_terminal_only(
    switches: list[str], shown: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert compile_it(place, tmp_path / "m.onnx", "--no-check", *switches) == 0
    assert bool(BAR.search(sys.stderr.getvalue())) == shown  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert compile_it(place, tmp_path / "m.onnx", "--no-check", "--force", *switches) == 0
    assert not BAR.search(sys.stderr.getvalue())  # type: ignore[attr-defined]


def test_one_form_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["compile", "m.pt", "--out", "m.onnx", "--quiet", "--verbose"]) == 2
        and "not allowed with" in capsys.readouterr().err
    )


def test_a_library_is_silent_and_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    log.stage("load")
    log.info("x")
    log.finish()
    assert capsys.readouterr() == ("", "")
    before = progress.enabled
    with log.using(log.JSON):
        assert not progress.enabled
    assert progress.enabled == before


def test_a_bar_within_a_bar_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "enabled", True)
    found = [
        (a, b)
        for a in progress.progress([1, 2], description="outer")
        for b in progress.progress("xy", description="inner")
    ]
    assert found == [(1, "x"), (1, "y"), (2, "x"), (2, "y")] and "outer" in terminal.getvalue()
    next(iter(progress.progress([1, 2], description="left early")))
    # the cursor
    assert (
        sys.stderr is terminal and terminal.getvalue().count("\033[?25l") == terminal.getvalue().count("\033[?25h") > 0
    )


def test_every_event_reaches_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    """A program that uses the package as a library sees its stages, and a name from a file cannot forge a second line.
    """
    with caplog.at_level(logging.DEBUG, "repquant_fx"):
        log.stage("load")
        log.warning("odd\nname")
        log.detail("for --verbose")
        log.result({"bits": "W8A8"})
        log.finish()
    found = [(record.levelname, record.event, record.getMessage()) for record in caplog.records]
    assert found[:4] == [("DEBUG", "stage_started", "load begins"), ("WARNING", "warning", "odd\\nname"),
                         ("DEBUG", "detail", "for --verbose"), ("INFO", "result", "finished")]
    assert found[4][:2] == ("INFO", "stage_finished") and caplog.records[4].fields["stage"] == "load"
    assert caplog.records[3].fields == {"bits": "W8A8"}  # type: ignore[attr-defined]


def test_nothing_is_logged_where_nobody_asked() -> None:
    """Not even a warning or an error, which Python's last resort would print."""
    script = "from repquant_fx import log\nlog.warning('w')\nlog.stage('load')\nlog.finish()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_tasks_are_those_of_the_frontend(capsys: pytest.CaptureFixture[str]) -> None:
    """The help names each, and reading them loads no torch."""
    script = (
        "import sys, repquant_fx.cli as cli\n"
        "try:\n    cli.main(['compile', '--help'])\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    text = "".join(done.stdout.split())  # names are broken at their hyphens
    assert ",".join(TASKS) in text and text.endswith("False")


@pytest.mark.parametrize("command", [[], ["compile"], ["evaluate"], ["inspect"]])
def test_exit_codes_are_documented(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0 and " ".join(EXIT_CODES.split()) in " ".join(capsys.readouterr().out.split())
