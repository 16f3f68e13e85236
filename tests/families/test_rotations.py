"""Rotations in every family: where the flow allows one, the float graph stays what it was, with the operators it had.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from captures import captured, keywords
from models import FAMILIES
from torch.fx import GraphModule

from repquant_fx.frontends.capture import tensors_in
from repquant_fx.passes.base import run_passes, shared_copy
from repquant_fx.passes.normal_form import normalize
from repquant_fx.passes.rotate_vectors import RotateVectors
from repquant_fx.pipeline.rotation import find_candidates, rotations

# What must rotate: how many residual streams, and how many pairs of products of heads at least (values, and queries
# with keys).
EXPECTED = {
    "vit": (1, 2),
    "deit_distilled": (1, 2),
    "beit": (1, 2),
    "dinov2_registers": (1, 2),
    "vit_layer_scale": (1, 2),
    "vit_average": (1, 2),
    "vit_average_late": (1, 2),
    "vit_no_affine": (1, 2),
    "vit_qk_norm": (1, 1),
    "clip_image_timm": (0, 2),
    "swin": (1, 4),
    "swin_hf": (1, 4),
    "sam_timm": (1, 2),
    "sam_hf": (1, 2),
    "opt": (1, 2),
    "llama": (1, 1),
    "mistral": (1, 1),
    "qwen2": (1, 1),
    "qwen3": (1, 1),
    "gpt2": (1, 2),
    "bert": (0, 2),
    "bert_masked": (0, 2),
    "clip": (1, 4),
    "vit_hf": (1, 2),
    "yolos": (1, 2),
    "dinov2_hf": (0, 2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_rotations_are_identities_that_add_no_operator(name: str) -> None:
    found = captured(name)
    graph_module, other = normalize(shared_copy(found.graph_module)), FAMILIES[name].inputs(3, 12, 1)
    inputs = list(other.values()) if keywords(other) is None else [other[n] for n in found.input_names]
    with torch.no_grad():
        before = tensors_in(graph_module(*inputs))
    operators = Counter(n.target for n in graph_module.graph.nodes if n.op == "call_function")
    candidates = find_candidates(graph_module)
    possible = [c for c in candidates if not c.reason]
    residual, heads = EXPECTED.get(name, (0, 0))
    assert sum(c.kind == "residual" for c in possible) >= residual, [(c.path, c.reason) for c in candidates]
    assert sum(c.kind == "heads" for c in possible) >= heads, [(c.kind, c.path, c.reason) for c in candidates]
    assert all(c.reason for c in candidates if c not in possible)
    rotated = shared_copy(graph_module)
    # the candidates of the copy itself: a pass rewrites the graph in which they were found
    run_passes(rotated, [RotateVectors(rotations([c for c in find_candidates(rotated) if not c.reason], seed=0))])
    with torch.no_grad():
        after = tensors_in(rotated(*inputs))
    for a, b in zip(before, after, strict=True):
        if a.is_floating_point():
            assert float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) < 2e-5
    assert Counter(n.target for n in rotated.graph.nodes if n.op == "call_function") == operators
    changed = [c.path for c in possible]
    if changed:  # something was really rotated
        assert any(
            not torch.equal(p, q) for p, q in zip(_constants(graph_module), _constants(rotated)) if p.shape == q.shape
        )


def _constants(graph_module: GraphModule) -> list[torch.Tensor]:
    from repquant_fx.passes.base import attribute

    return [attribute(graph_module, n.args[1]) for n in graph_module.graph.nodes  # type: ignore[arg-type]
            if n.target is torch.ops.aten.linear.default]
