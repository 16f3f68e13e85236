"""The versions that are written down: those of setup.cfg, and what is installed lies between them."""

from __future__ import annotations

import configparser
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = "docs/reference/versions.md"


def parsed(text: str) -> tuple[int, ...]:
    """The release numbers of a version without trailing zeros; what follows them, such as `+cpu`, does not count."""
    found = re.match(r"\d+(\.\d+)*", text)
    assert found, text
    numbers = [int(part) for part in found.group().split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def table() -> dict[str, tuple[str, str]]:
    """(lowest promised, highest tried) of each package on the page."""
    rows = re.findall(
        r"^\| (\w+) \| ([\d.]+) \| (?:yes|no) \| ([\d.]+) \|$", (ROOT / PAGE).read_text(encoding="utf-8"), re.M
    )
    return {name: (lowest, highest) for name, lowest, highest in rows}


def judge(name: str, installed: str, lowest: str, highest: str) -> None:
    """Raises:
    AssertionError: the installed version is lower than what is promised.
    """
    assert parsed(installed) >= parsed(lowest), (
        f"{name} {installed} is lower than the {lowest} that {PAGE} promises: install a newer one, or, if the tests "
        "pass with it, lower the table and setup.cfg"
    )
    if parsed(installed) > parsed(highest):
        warnings.warn(f"{name} {installed} is newer than {highest} in {PAGE}: update the table", stacklevel=2)


@pytest.mark.parametrize("name", ["torch", "timm", "transformers", "onnx", "onnxruntime", "openvino"])
def test_installed_versions(name: str) -> None:
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    judge(name, installed, *table()[name])


def test_what_is_promised_is_what_setup_asks_for() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    asked = dict(
        re.findall(
            r"^(\w+)>=([\d.]+)",
            "\n".join([setup["options"]["install_requires"], *setup["options.extras_require"].values()]),
            re.M,
        )
    )
    assert len(table()) == 6 and {name: lowest for name, (lowest, _) in table().items()} == {
        n: asked[n] for n in table()
    }


def test_lower_fails_and_newer_warns() -> None:
    judge("a", "2.9.0+cpu", "2.9", "2.15.0")
    with pytest.raises(AssertionError, match=r"a 2\.8\.9 is lower"):
        judge("a", "2.8.9", "2.9", "2.15.0")
    with pytest.warns(UserWarning, match=r"newer than 2\.15\.0"):
        judge("a", "2.15.1", "2.9", "2.15.0")
