"""The sweep over architectures: what is tried first, models made small, processes that end, and the page."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import ANY

import architectures
import graphs
import pytest
import results
import small_configurations
import torch
from results import Row
from torch import nn

DOCUMENT = Path(__file__).parents[2] / "docs/architectures.md"
ROWS = {(("timm", name), 0): Row({"outcome": outcome, "reason": reason, "seconds": 1.0}, {"known": {"timm": 9}}, {})
        for name, outcome, reason in (("b", "code for code", ""), ("a", "code for code", ""),
                                      ("c", "refused", "a | b `c`"), ("d", "not captured", "x"))}


def test_one_of_each_file_comes_first() -> None:
    names = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "c1": "c", "c2": "c"}
    assert architectures.rounds(names) == [["a1", "b1", "c1"], ["a2", "c2"], ["a3"]]
    assert architectures.rounds(names, 4) == [["a1", "b1", "c1"], ["a2"], []]
    assert architectures.rounds(names, 2) == [["a1", "c1"]] and architectures.rounds(names, 0) == [[]]
    assert architectures.ordered({"x": names, "y": {"d1": "d"}}, 4) == [
        ("x", "a1"), ("y", "d1"), ("x", "b1"), ("x", "c1"), ("x", "a2")]


def test_configurations_are_made_small() -> None:
    large = {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 30522, "head_dim": 64, "dropout": 0.1,
             "hidden_sizes": [64, 128], "depths": [3, 4], "tie": True, "pad_token_id": 50256, "eps": 1,
             "text_config": {"d_model": 512}, "layer_types": ["full", "sliding"]}
    small = small_configurations.smaller(large, dropped=("layer_types",))
    assert small == {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 16, "dropout": 0.1,
                     "hidden_sizes": [32, 32], "depths": [2, 1], "tie": True, "pad_token_id": 3, "eps": 1,
                     "text_config": {"d_model": 32}}


def test_configurations_agree_with_themselves() -> None:
    """Lists of layers, what turns of a head, and the heads of a state space follow the smaller numbers."""
    large = {"num_hidden_layers": 6, "layer_types": ["full", "full", "full", "sliding", "full", "sliding"],
             "per_layer_config": {"3": {"window": 4}}, "sparse": [0, 1, 2, 3, 4, 5], "hidden_size": 1024,
             "num_attention_heads": 8, "rope_parameters": {"mrope_section": [24, 20, 20]}, "mamba_expand": 2,
             "mamba_n_heads": 64, "mamba_d_head": 32, "vocab_size": None}
    small = small_configurations.smaller(large)
    assert small["layer_types"] == ["full", "sliding"] and small["sparse"] == [0, 3]
    assert small["per_layer_config"] == {"1": {"window": 4}}
    assert small["rope_parameters"]["mrope_section"] == [4, 2, 2]  # half of a head of 32 / 2
    assert small["mamba_n_heads"] * small["mamba_d_head"] == 2 * small["hidden_size"]
    assert small["vocab_size"] is None and small_configurations.smaller(large, filled=True)["vocab_size"] == 96


def test_graphs_that_are_one_to_a_compiler() -> None:
    def of(width: int, activation: type[nn.Module] = nn.GELU) -> str:
        return graphs.fingerprint(nn.Sequential(nn.Linear(8, width), activation(), nn.Softmax(-1)), torch.randn(2, 8))

    assert of(16) == of(24) != of(16, nn.SiLU)
    assert graphs.fingerprint(nn.Softmax(1), torch.randn(2, 3)) != graphs.fingerprint(nn.Softmax(0), torch.randn(2, 3))


def test_a_graph_that_compiled_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "small_timm", lambda name: (nn.Linear(8, 8), torch.randn(2, 8)))
    monkeypatch.setattr(architectures, "_compiled", lambda model, inputs: {"outcome": "code for code", "reason": ""})
    first = architectures.outcome("timm", "a")
    assert first["graph"] and "as" not in first
    second = architectures.outcome("timm", "b", {first["graph"]: "a"})
    assert second == {"outcome": "code for code", "reason": "", "as": "a"}


def test_processes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def burn(library: str, name: str, compiled: object) -> None:
        while True:
            pass

    monkeypatch.setattr(architectures, "outcome", lambda library, name, compiled: {"outcome": library + name})
    assert architectures.in_a_child("a", "b", 60, {})["outcome"] == "ab"
    monkeypatch.setattr(architectures, "outcome", burn)
    assert architectures.in_a_child("a", "b", 0.1, {}) == {"outcome": "time limit", "reason": "0.1 s"} | {
        "seconds": pytest.approx(1, abs=1000)}
    monkeypatch.setattr(architectures, "outcome", lambda library, name, compiled: os._exit(7))
    assert architectures.in_a_child("a", "b", 60, {})["reason"] == "it ended with the code 7"


def test_reasons_are_short_and_name_no_folder_of_this_machine() -> None:
    assert architectures.shortened("no  mask, at\n/a/b/site-packages/c/d.py:3") == "no mask, at c/d.py:3"
    assert len(architectures.shortened("x" * 999)) == 200


def test_the_page_counts() -> None:
    text = architectures.page(ROWS)
    same = {**ROWS, (("timm", "e"), 0): Row({"outcome": "code for code", "reason": "", "as": "a"}, {}, {})}
    assert "sizes aside | 0 |" in text and "sizes aside | 1 |" in architectures.page(same)
    assert "**timm**: `a`, `b`, `e` (as `a`)." in architectures.page(same)
    assert "| tried | 4 |" in text and "| known | 9 |" in text and "captures** | 66.7 % |" in text
    assert "| timm `c` | refused | `a \\| b 'c'` |" in text and "**timm**: `a`, `b`." in text


def test_the_page_of_the_documents_is_that_of_the_rows() -> None:
    rows = results.load(results.FOLDER / "architectures.json")
    assert rows and DOCUMENT.read_text(encoding="utf-8") == architectures.page(rows)


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def tried(library: str, name: str, seconds: float, compiled: object) -> results.Values:
        done.append(name)
        if name == "stop":
            raise KeyboardInterrupt
        return {"outcome": "code for code", "reason": ""}

    monkeypatch.setattr(architectures, "in_a_child", tried)
    about, path = {"commit": "a"}, tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        architectures.run(results.Results(path, about=about), [("timm", "one"), ("timm", "stop")], 1)
    architectures.run(results.Results(path, about=about), [("timm", "one"), ("timm", "two")], 1)
    assert done == ["one", "stop", "two"] and len(results.load(path)) == 2
    architectures.run(results.Results(path, about=about), [("timm", "one")], 1, ["code for code"])
    assert done[3:] == ["one"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "transformers:bert", "transformers:afmoe"])
def test_small_models_compile(name: str) -> None:
    assert sys.platform != "win32"
    library, _, kind = name.partition(":")
    assert architectures.outcome(library, kind) == {
        "outcome": architectures.DONE, "reason": "", "graph": ANY}
