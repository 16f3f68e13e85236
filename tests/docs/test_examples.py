"""The examples: every command line is one that the command line takes, and the pipeline runs from end to end."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import ROOT, commands
from test_samples import known_extras

from repquant_fx import Recipe
from repquant_fx.cli import parser

EXAMPLES = ROOT / "examples"


def workflow() -> dict[Any, Any]:
    return yaml.safe_load((EXAMPLES / "github-actions.yml").read_text(encoding="utf-8"))


def steps() -> list[dict[str, Any]]:
    return [step for job in workflow()["jobs"].values() for step in job["steps"]]


def script(name: str) -> str:
    """The shell script in an example; of the Dockerfile what its comments suggest, too."""
    if name == "github-actions.yml":
        return "\n".join(step.get("run", "") for step in steps())
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    return re.sub(r"^#", "", text, flags=re.MULTILINE) if name == "Dockerfile" else text


@pytest.mark.parametrize(("name", "expected"), [("github-actions.yml", 3), ("pipeline.sh", 3)])
def test_commands_parse(name: str, expected: int) -> None:
    mine = [command.words[1:] for command in commands(script(name)) if command.words[0] == "repquant-fx"]
    assert len(mine) == expected
    for words in mine:
        parser().parse_args(words)


def test_dockerfile() -> None:
    text = script("Dockerfile")
    (suggested,) = re.findall(r"docker run .*? repquant-fx (compile .*)", text)
    parser().parse_args(shlex.split(suggested))
    assert set(re.findall(r"\[([\w,]+)\]\"", text)[0].split(",")) <= known_extras()
    entry, arguments = (
        json.loads(re.findall(rf"^{word} (.*)$", text, re.MULTILINE)[0]) for word in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["repquant-fx"] and arguments == ["--help"]
    instructions = re.findall(r"^([A-Z]+) ", text, re.MULTILINE)
    assert instructions[0] == "FROM" and instructions.index("USER") < instructions.index("ENTRYPOINT")
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    }
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "repquant_fx", "passes", "exporters"} == kept
    assert all((ROOT / name).exists() for name in kept)


def test_workflow() -> None:
    known = workflow()
    assert set(known) == {"name", True, "permissions", "env", "jobs"}  # YAML 1.1 reads the key `on` as true
    for step in steps():
        assert ("uses" in step) != ("run" in step)
    text = script("github-actions.yml")
    assert set(re.findall(r"\$\{?([A-Z_0-9]+)", text)) <= {*known["env"], "GITHUB_STEP_SUMMARY"}
    assert set(re.findall(r"\[([\w,]+)\]\"", text)[0].split(",")) <= known_extras()
    Recipe.from_file(EXAMPLES / "recipe.yaml")


def test_pipeline_runs(world: Path, tmp_path: Path) -> None:
    """The pipeline with the real command line: a model that is good enough, and a recipe that is not there. The
    workflow reads keys that the results have.
    """
    if shutil.which("jq") is None or os.name != "posix":
        pytest.skip("needs sh and jq")
    command = tmp_path / "bin/repquant-fx"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m repquant_fx "$@"\n')
    command.chmod(0o755)
    settings = {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MODEL": str(world / "model.pt2"),
        "CALIB": str(world / "images"),
        "VAL": str(world / "val"),
        "RECIPE": str(EXAMPLES / "recipe.yaml"),
    }

    def run(out: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(EXAMPLES / "pipeline.sh"), str(tmp_path / out)],
            env={**settings, **changes},
            capture_output=True,
            text=True,
        )

    good = run("good", MOST_DROP="50")
    assert good.returncode == 0, good.stderr
    summary = json.loads(good.stdout)
    assert summary["float"] == 100 and summary["megabytes"] > 0 and summary["output_sqnr_db"] > 0
    assert (tmp_path / "good/model.onnx").is_file() and json.loads((tmp_path / "good/report.json").read_text())[
        "layers"
    ]
    missing = run("missing", RECIPE="missing.yaml")
    assert (
        missing.returncode == 2 and "missing.yaml" in missing.stderr and not (tmp_path / "missing/model.onnx").exists()
    )
    for key in re.findall(r"jq \.(\w+) build/(\w+)\.json", script("github-actions.yml")):
        file = {"accuracy": "quantized"}.get(key[1], key[1])
        assert key[0] in json.loads((tmp_path / f"good/{file}.json").read_text())
