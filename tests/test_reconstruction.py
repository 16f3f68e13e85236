"""Block reconstruction in a whole compile: never below where it started, the same again, and the file as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Encoder, images, match, output, redraw, sequences, vit
from torch.fx import GraphModule

from repquant_fx import CompiledModel, Recipe, compile
from repquant_fx.errors import RecipeError, RepQuantWarning
from repquant_fx.parity import sqnr
from repquant_fx.passes.base import run_passes
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.pipeline.blocks import find_blocks
from repquant_fx.pipeline.segments import between

IMAGES = torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(1))
STEPS = 40


def compiled(steps: int, work_dir: Path | None = None, bits: int = 3) -> CompiledModel:
    recipe = Recipe(wbits=bits, abits=bits, reconstruct=steps)
    return compile(vit(2), IMAGES, recipe, example_inputs=(IMAGES[:2],), work_dir=work_dir)


@pytest.fixture(scope="module")
def plain() -> CompiledModel:
    return compiled(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reconstruction")


@pytest.fixture(scope="module")
def learned(place: Path) -> CompiledModel:
    return compiled(STEPS, place)


def test_blocks_are_the_whole_graph_cut_where_one_value_passes(vit_graph: Callable[[], GraphModule]) -> None:
    graph_module = vit_graph()
    plan = match(graph_module)
    run_passes(graph_module, [InsertObservers(plan, 1)])
    names = {node.name for node in graph_module.graph.nodes}
    blocks = find_blocks(graph_module, plan, names, groups=3)
    assert len(blocks) > 2
    nodes = [node for block in blocks for node in between(block.first, block.stop)]
    assert nodes == [n for n in graph_module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    for block in blocks[:-1]:
        assert block.leaves is not None
        inside = set(between(block.first, block.stop))
        read_behind = {node for node in inside if any(reader not in inside for reader in node.users)}
        assert {node for node in read_behind if isinstance(node.meta.get("val"), torch.Tensor)} == {block.leaves}
    assert blocks[-1].stop is None and blocks[-1].leaves is None


def test_errors_do_not_grow(learned: CompiledModel, plain: CompiledModel) -> None:
    blocks = learned.report["reconstruction"]
    assert blocks[0]["first"] == "patch_embed.proj" and blocks[-1]["last"] == "head"
    for block in blocks:
        own, feature = block["own"], block["feature"]
        assert feature[1] / feature[0] + 2 * own[1] / own[0] <= 3
        assert block["kept_step"] or (own[0] == own[1] and feature[0] == feature[1])
    assert any(block["kept_step"] for block in blocks)
    # on many images that neither has seen; a model that was never trained gains hardly anything at the output
    unseen = images(512, seed=2)
    exact = output(vit(2), unseen)
    before, after = (sqnr(output(each.graph_module, unseen), exact) for each in (plain, learned))
    assert after > before - 0.6
    assert "reconstruction" not in plain.report


def test_the_file_has_the_same_form(learned: CompiledModel, plain: CompiledModel) -> None:
    assert learned.to_bytes() != plain.to_bytes()
    assert learned.parity is not None
    learned.parity.raise_on_problems()
    operators = [Counter(node.op_type for node in model.proto.graph.node) for model in (learned, plain)]
    assert operators[0] == operators[1]
    shapes = [
        {t.name: (t.data_type, tuple(t.dims)) for t in model.proto.graph.initializer} for model in (learned, plain)
    ]
    assert shapes[0] == shapes[1]


def test_it_is_the_same_again_and_continued(learned: CompiledModel, place: Path) -> None:
    assert compiled(STEPS).to_bytes() == learned.to_bytes()
    folder = next(path for path in place.iterdir() if path.is_dir())
    kept = sorted(folder.glob("block-*"))
    assert len(kept) == len(learned.report["reconstruction"])
    kept[-1].unlink()
    again = compiled(STEPS, place)
    assert again.to_bytes() == learned.to_bytes()
    assert again.report["reconstruction"] == learned.report["reconstruction"]


def test_a_block_of_another_shape_is_learned_anew(place: Path, learned: CompiledModel) -> None:
    from safetensors.torch import load_file

    from repquant_fx.checkpoint import Checkpoint

    folder = next(path for path in place.iterdir() if path.is_dir())
    name = sorted(folder.glob("block-*"))[0].stem
    tensors = load_file(folder / f"{name}.safetensors")
    Checkpoint(folder).save(name, {key: value for key, value in tensors.items() if key == "figures"})
    with pytest.warns(RepQuantWarning, match="does not fit"):
        assert compiled(STEPS, place).to_bytes() == learned.to_bytes()


def test_a_masked_model_with_one_batch() -> None:
    """Exact zeros of a mask stay exact, and where there is one batch it is both learned from and looked at."""
    tokens = sequences(8)
    result = compile(
        redraw(Encoder(causal=True)), tokens, Recipe(wbits=4, abits=4, reconstruct=3), example_inputs=(tokens[:2],)
    )
    assert result.parity is not None
    result.parity.raise_on_problems()


@pytest.mark.parametrize("wrong", [-1, 1.5, True, 10**9])
def test_steps_are_a_number_of_steps(wrong: object) -> None:
    with pytest.raises(RecipeError, match="reconstruct"):
        Recipe(reconstruct=wrong)  # type: ignore[arg-type]
