"""The samples of the documents: Python and `repquant-fx` are run, page by page, on a tiny model; what cannot be run
here is parsed.
"""

from __future__ import annotations

import configparser
import contextlib
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import PAGES, ROOT, Block, Command, blocks, commands
from samples import images, model
from torch.utils.data import DataLoader, TensorDataset

from repquant_fx.cli import main, parser

LANGUAGES = {"python", "sh", "yaml", "toml", "json", "text"}
# known commands that are never run
ELSEWHERE = {"docker", "eval", "source", "netron", "pip", "make", "python", "torchrun", "jq", "olive", "pipx"}
CLI = "repquant-fx"
FILE = re.compile(r"# (?:tests/)?passes/(\w+)\.py\n")  # first line of a block that is a whole file


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language in ("python", "sh") for b in blocks(p))], ids=name_of
)
def test_samples(
    page: Path, folder: Path, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_labels = TensorDataset(images(), torch.arange(len(images())) % 5)
    namespace = {
        "__name__": "sample",
        "module": model(),
        "images": images(),
        "loader": DataLoader(with_labels, batch_size=32),
    }
    for block in blocks(page):
        where = f"{name_of(page)}:{block.line}"
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, name_of(page), "exec")
            if block.why is None:
                exec(code, namespace)
                if file := FILE.match(block.code):
                    install(f"repquant_fx.passes.{file[1]}", namespace, monkeypatch)
        elif block.language == "sh":
            for command in commands(block.code):
                try:
                    check(command, block, capsys)
                except Exception as error:
                    raise AssertionError(f"{where}: {' '.join(command.words)}: {error}") from error


def install(name: str, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make what a block defines importable as a module, and run its tests."""
    module = types.ModuleType(name)
    vars(module).update(namespace)
    monkeypatch.setitem(sys.modules, name, module)
    for test in [each for each in namespace if each.startswith("test_")]:
        namespace.pop(test)()


def check(command: Command, block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Run it, or see that it could be run."""
    words = list(command.words)
    while re.fullmatch(r"[A-Z][A-Z_]*=.*", words[0]):  # a variable of this one command; some test reads it
        variable = words.pop(0).partition("=")[0]
        assert any(variable in path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    name, *arguments = words
    if name == "torchrun":
        assert arguments.count("repquant_fx") == 1
        name, arguments = CLI, arguments[arguments.index("repquant_fx") + 1:]
    if name != CLI:
        check_other(name, arguments)
    elif block.why is not None:
        parser().parse_args(arguments)
    else:
        capsys.readouterr()
        with contextlib.suppress(SystemExit):  # --version
            code = main(arguments)
            said = capsys.readouterr()
            assert code == command.exit_code, f"exit code {code}\n{said.err}"
            if command.output is not None:
                Path(command.output).write_text(said.out, encoding="utf-8")


def with_neighbours(script: Path) -> set[Path]:
    """A script, and those beside it or above it that it imports: some options are shared."""
    found, pending = set[Path](), [script]
    while pending:
        path = pending.pop()
        found.add(path)
        names = re.findall(r"^from (\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
        candidates = [folder / f"{name}.py" for name in names for folder in (path.parent, path.parents[1])]
        pending += [each for each in candidates if each.is_file() and each not in found]
    return found


def check_other(name: str, arguments: list[str]) -> None:
    """What a sample names exists: scripts and their options, extras, targets of make."""
    assert name in ELSEWHERE, f"unknown command {name}"
    if name == "python" and arguments[0] != "-m":
        script = "".join(path.read_text(encoding="utf-8") for path in with_neighbours(ROOT / arguments[0]))
        missing = [
            a for a in arguments[1:] if a.startswith("--") and f'"{a}"' not in script and "--{name}" not in script
        ]
        assert not missing, f"{arguments[0]} has no {missing}"
    if name == "pip":
        extras = {e for a in arguments for found in re.findall(r"\[([\w,]+)\]", a) for e in found.split(",")}
        assert extras <= known_extras(), f"no extra {extras - known_extras()}"
    if name == "make":
        assert all(
            re.search(rf"^{a}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE) for a in arguments
        )


def known_extras() -> set[str]:
    configuration = configparser.RawConfigParser()
    configuration.read(ROOT / "setup.cfg")
    return set(configuration["options.extras_require"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(list(blocks(page))), "a fenced block is not closed, or is indented"
    for block in blocks(page):
        assert block.language in LANGUAGES, (
            f"{name_of(page)}:{block.line}: a block needs one of {sorted(LANGUAGES)}, not {block.language!r}"
        )
    assert text.count("<!-- not run:") == sum(block.why is not None for block in blocks(page)), (
        "a mark that belongs to no block"
    )
