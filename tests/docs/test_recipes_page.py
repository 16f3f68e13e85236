"""The recipe that the page calls RepQuant as published is the one that the benchmarks measure."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

from repquant_fx import Recipe

ROOT = Path(__file__).parents[2]


def test_the_published_recipe_is_that_of_the_benchmarks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("accuracy", None)
    from accuracy import published

    page = (ROOT / "docs/guide/recipes.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"is this recipe \(.*?```yaml\n(.*?)```", page, re.DOTALL)
    assert Recipe.from_dict({"wbits": 4, "abits": 4, **yaml.safe_load(text)}) == published(4, 4)
