"""The wheel: all of the package is in it, and it compiles a model in an environment of its own, without the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import FAST
from pictures import ARCH

import repquant_fx

ROOT = Path(__file__).parents[1]
PARTS = {"repquant_fx": "repquant_fx", "passes": "repquant_fx/passes", "exporters": "repquant_fx/exporters"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is in the repository, which is gone afterwards; the links that `make` makes are not in
    it.
    """
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", *(("passes", "exporters") if name == "repquant_fx" else ()))
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
        "--wheel-dir", place, source)
    shutil.rmtree(source)
    (built,) = place.glob("*.whl")
    return built


def run(*command: object, **options: object) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.mark.slow
def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    expected = {
        f"{inside}/{file.relative_to(ROOT / folder)}"
        for folder, inside in PARTS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_the_command_has_the_name_of_the_package(wheel: Path) -> None:
    """So that pipx run finds it: pipx run --spec . repquant-fx."""
    with zipfile.ZipFile(wheel) as archive:
        (entries,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "repquant-fx = repquant_fx.cli:main" in entries.splitlines()
    assert wheel.name.startswith(f"repquant_fx-{repquant_fx.__version__}-")


@pytest.mark.slow
def test_it_compiles_without_the_source(wheel: Path, tmp_path: Path) -> None:
    """The packages that it needs are those of this environment; its own come from the wheel alone."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the links in there are not followed
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    np.save(tmp_path / "calib.npy", np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype("float32"))
    where = run(python, "-c", "import repquant_fx.passes as p; print(p.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(own)
    command = tmp_path / "env/bin/repquant-fx"
    assert command.exists()
    run(command, "compile", ARCH, "--calib", "calib.npy", "--out", "model.onnx", *FAST, cwd=tmp_path)
    assert "blocks.0.attn.qkv" in run(command, "inspect", "model.onnx", cwd=tmp_path)
