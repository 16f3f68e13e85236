"""`.pt2` files whose graphs would read or write out of bounds, fill the memory or not end are refused.

Long because it is a list of programs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attacks import archive_of, records_of
from programs import (
    CONSTANTS,
    MODEL,
    WEIGHTS,
    Calls,
    argument,
    as_bytes,
    edited,
    nodes,
    program,
    saved,
    with_shape,
    with_values,
)
from torch import Tensor, nn

from repquant_fx.errors import InputError
from repquant_fx.frontends.capture import capture
from repquant_fx.frontends.exported import load_exported
from repquant_fx.frontends.pt2_operators import is_safe_operator

aten = torch.ops.aten
IMAGE = torch.ones(1, 2, 4, 4)


def _backward(x: Tensor, gradient: Tensor, indices: Tensor) -> Tensor:
    return aten.max_pool2d_with_indices_backward(gradient, x, [2, 2], [2, 2], [0, 0], [1, 1], False, indices)


def _normalized(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return aten._native_batch_norm_legit_no_training(x, weight, bias, mean, var, 0.1, 1e-5)[0]


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return torch.nn.functional.batch_norm(x, mean, var, weight, bias)


def _statistics(count: int = 2) -> list[Tensor]:
    return [torch.ones(count) for _ in range(4)]


def _set(name: str, value: Any, position: int = -1) -> Callable[[Any], None]:
    """Change an argument of a node."""

    def change(document: Any) -> None:
        given = argument(nodes(document)[position], name)
        given.clear()
        given.update(value)

    return change


def _target(name: str) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        nodes(document)[-1]["target"] = f"torch.ops.aten.{name}"

    return change


def _meta(change: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda document: change(document["config"]["t0"]["tensor_meta"])


def hostile(kind: str) -> bytes:
    """A program that does harm where nothing stops it. Long because it is the list of them."""
    table, indices = torch.ones(4, 3), torch.tensor([0, 1])
    looks_up = program(
        lambda x, table, indices: x.sum() + torch.nn.functional.embedding(indices, table), table, indices
    )
    adds = program(lambda x, t: x + t, torch.ones(4))
    grid = torch.zeros(1, 2, 2, 2)
    samples = program(lambda x, grid: aten.grid_sampler_2d(x, grid, 0, 0, False), grid, x=IMAGE)
    resizes = program(lambda x: aten.upsample_bilinear2d(x, [8, 8], False, 2.0, 2.0), x=IMAGE)
    attends = program(
        lambda x, k, v: aten.scaled_dot_product_attention(x, k, v),
        torch.ones(1, 2, 6, 4),
        torch.ones(1, 2, 6, 4),
        x=IMAGE,
    )
    makes: dict[str, Callable[[], bytes]] = {
        "backward": lambda: with_values(
            program(_backward, torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.long), x=IMAGE),
            1,
            torch.full((1, 2, 2, 2), 1 << 40),
        ),
        "kernel of a batch norm": lambda: with_shape(program(_normalized, *_statistics(), x=IMAGE), 1, [1]),
        "batch norm": lambda: with_shape(program(_batch_norm, *_statistics(), x=IMAGE), 1, [1]),
        "layer norm": lambda: with_shape(
            program(lambda x, w: aten.native_layer_norm(x, [4], w, w, 1e-5)[0], torch.ones(4)), 0, [1]
        ),
        "group norm": lambda: edited(
            program(lambda x, w: aten.native_group_norm(x, w, w, 1, 2, 16, 1, 1e-5)[0], torch.ones(2), x=IMAGE),
            _set("HxW", {"as_int": 1 << 30}, 0),
        ),
        "index of a table": lambda: with_values(looks_up, 1, torch.tensor([0, 1 << 40])),
        "gather": lambda: with_values(
            program(lambda x, i: x.gather(1, i), torch.zeros(2, 2, dtype=torch.long)), 0, torch.full((2, 2), -9)
        ),
        "view behind the end": lambda: edited(
            program(lambda x: x.as_strided([2, 2], [1, 1])), _set("size", {"as_ints": [9, 9]})
        ),
        "view of half of a number": lambda: edited(
            program(lambda x: x.as_strided([2, 2], [1, 1])), _set("stride", {"as_ints": [-1, 1]})
        ),
        "attention": lambda: with_shape(attends, 1, [1, 2, 1, 4]),
        "mode": lambda: edited(samples, _set("interpolation_mode", {"as_int": 77})),
        "scale of other sizes": lambda: edited(resizes, _set("scales_h", {"as_float": 0.01})),
        "scale of an antialiased resize": lambda: program(
            lambda x, z: x.sum() + aten._upsample_bilinear2d_aa(z, [64, 64], False, 0.001, 0.001),
            torch.ones(1, 1, 4, 4),
        ),
        "scale": lambda: edited(resizes, _set("scales_h", {"as_float": 1e-300})),
        "full": lambda: edited(
            program(lambda x: x + aten.full([2, 4], 1.0)), _set("size", {"as_ints": [1 << 40, 4]}, 0)
        ),
        "arange": lambda: edited(program(lambda x: x + aten.arange(4)), _set("end", {"as_int": 1 << 50}, 0)),
        "arange of the least integer": lambda: edited(
            program(lambda x: x + aten.arange.start_step(1, -3, -1)), _set("end", {"as_int": 1 - (1 << 63)}, 0)
        ),
        "repeat": lambda: edited(program(lambda x: x.repeat([2, 2])), _set("repeats", {"as_ints": [1 << 25, 1 << 20]})),
        "expand": lambda: edited(
            program(lambda x: x[:1].expand([2, 4]).relu()), _set("size", {"as_ints": [1 << 50, 4]}, 1)
        ),
        "pad": lambda: edited(
            program(lambda x: aten.constant_pad_nd(x, [1, 1])), _set("pad", {"as_ints": [1 << 45, 1]})
        ),
        "groups": lambda: edited(
            program(lambda x, w: torch.nn.functional.conv2d(x, w), torch.ones(2, 2, 1, 1), x=IMAGE),
            lambda document: nodes(document)[-1]["inputs"].append({"name": "groups", "arg": {"as_int": 0}, "kind": 1}),
        ),
        "random": lambda: edited(program(lambda x: torch.zeros_like(x)), _target("rand_like.default")),
        "overload with out": lambda: edited(program(lambda x: x.relu()), _target("relu.out")),
        "file": lambda: edited(program(lambda x: x.relu()), _target("from_file.default")),
        "in place by index": lambda: edited(program(lambda x: x.relu()), _target("index_put_.default")),
        "payload": lambda: edited(adds, _meta(lambda meta: meta.update(sizes=[{"as_int": 4000}])), WEIGHTS),
        "offset": lambda: edited(adds, _meta(lambda meta: meta.update(storage_offset={"as_int": 1})), WEIGHTS),
        "negative stride": lambda: edited(adds, _meta(lambda meta: meta.update(strides=[{"as_int": -1}])), WEIGHTS),
        "negative size": lambda: edited(adds, _meta(lambda meta: meta.update(sizes=[{"as_int": -4}])), WEIGHTS),
        "expanded payload": lambda: edited(
            adds, _meta(lambda meta: meta.update(sizes=[{"as_int": 1 << 33}], strides=[{"as_int": 0}])), WEIGHTS
        ),
        "type of numbers": lambda: edited(adds, _meta(lambda meta: meta.update(dtype=10)), WEIGHTS),
        "sparse": lambda: edited(adds, _meta(lambda meta: meta.update(layout=1)), WEIGHTS),
        "declared otherwise": lambda: edited(
            adds,
            lambda document: document["graph_module"]["graph"]["tensor_values"]["b_t0"].update(sizes=[{"as_int": 1}]),
        ),
        "declared as whole numbers": lambda: edited(
            adds, lambda document: document["graph_module"]["graph"]["tensor_values"]["b_t0"].update(dtype=5)
        ),
        "missing weight": lambda: edited(adds, lambda document: document["config"].pop("t0"), WEIGHTS),
        "power": lambda: _arithmetic("pow", [{"as_int": 10}, {"as_int": 1 << 40}]),
        "shift": lambda: _arithmetic("lshift", [{"as_int": 1}, {"as_int": 1 << 40}]),
        "list times number": lambda: _arithmetic("mul", [{"as_ints": [1]}, {"as_int": 1 << 40}]),
        "device": lambda: edited(
            adds, lambda document: document["graph_module"]["graph"]["tensor_values"]["x"]["device"].update(type="meta")
        ),
        "precision": lambda: _sized("Float('1.5', precision=4000000000)"),
        "deep": lambda: _deep(),
        "key twice": lambda: _text(adds, b'"graph_module":', b'"graph_module": {}, "graph_module":'),
        "not a number": lambda: _text(
            adds, b'"range_constraints": {}', b'"range_constraints": {"s0": {"min_val": NaN, "max_val": null}}'
        ),
        "number of many digits": lambda: _text(
            adds, b'"range_constraints": {}', b'"range_constraints": {"s0": {"min_val": 1' + b"0" * 5000 + b"}}"
        ),
        "module of a node": lambda: edited(
            program(lambda x: x.relu()),
            lambda document: nodes(document)[0]["metadata"].update(
                nn_module_stack='L__self__,")+print(1)+(",torch.nn.Module'
            ),
        ),
        "name of a weight": lambda: _text(
            _text(adds, b'"t0"', b'"t0\\")+x"', WEIGHTS), b'"buffer_name": "t0"', b'"buffer_name": "t0\\")+x"'
        ),
        "many expressions": lambda: edited(
            adds,
            lambda document: document["graph_module"]["graph"]["tensor_values"].update(
                {
                    f"v{i}": {
                        **document["graph_module"]["graph"]["tensor_values"]["x"],
                        "sizes": [
                            {
                                "as_expr": {
                                    "expr_str": f"Add(s{i}, {', '.join(f's{i}{j}' for j in range(100))})",
                                    "hint": None,
                                }
                            }
                        ],
                    }
                    for i in range(1000)
                }
            ),
        ),
    }
    return makes[kind]()


def _text(data: bytes, old: bytes, new: bytes, record: str = MODEL) -> bytes:
    records = records_of(data)
    assert old in records[record]
    return archive_of({**records, record: records[record].replace(old, new)})


def _arithmetic(name: str, arguments: list[Any]) -> bytes:
    """A program with arithmetic of sizes that takes what the file likes."""

    def change(document: Any) -> None:
        graph = document["graph_module"]["graph"]
        graph["nodes"].insert(
            0,
            {
                "target": f"_operator.{name}",
                "inputs": [{"name": "", "arg": given, "kind": 1} for given in arguments],
                "outputs": [{"as_sym_int": {"as_name": "big"}}],
                "metadata": {},
                "name": "big",
                "is_hop_single_tensor_return": None,
            },
        )
        graph["sym_int_values"]["big"] = {"as_int": 5}

    return edited(program(lambda x: x.relu()), change)


def _sized(expression: str) -> bytes:
    return edited(
        program(lambda x: x.relu()),
        lambda document: document["graph_module"]["graph"]["tensor_values"]["x"]["sizes"].__setitem__(
            0, {"as_expr": {"expr_str": expression, "hint": {"as_int": 2}}}
        ),
    )


def _deep() -> bytes:
    def change(document: Any) -> None:
        graph = document["graph_module"]["graph"]
        for _ in range(60):
            graph = {
                **json.loads(json.dumps(document["graph_module"]["graph"])),
                "nodes": [{"inputs": [{"arg": {"as_graph": {"graph": graph}}}]}],
            }
        document["graph_module"]["graph"] = graph

    return edited(program(lambda x: x.relu()), change)


HOSTILE = {
    "backward": "max_pool2d_with_indices_backward",
    "kernel of a batch norm": "batch_norm",
    "batch norm": "batch_norm",
    "layer norm": "weight",
    "group norm": "sizes are not",
    "index of a table": "out of range|out of bounds",
    "gather": "out of range|out of bounds|index",
    "view behind the end": "behind its tensor|out of bounds",
    "view of half of a number": "of no tensor|negative",
    "attention": "do not fit each other",
    "mode": "mode is none",
    "scale of other sizes": "scale is not that of its sizes",
    "scale of an antialiased resize": "scale is not that of its sizes",
    "scale": "scale is not",
    "full": "takes .* and this machine",
    "arange": "takes .* and this machine",
    "arange of the least integer": "ends are too large",
    "repeat": "takes .* and this machine",
    "expand": "takes .* and this machine|expand",
    "pad": "takes .* and this machine",
    "groups": "conv2d",
    "random": "rand_like",
    "overload with out": "relu.out",
    "file": "from_file",
    "in place by index": "index_put_",
    "payload": "16000 bytes but stores 16",
    "offset": "20 bytes but stores 16",
    "negative stride": "sizes or strides",
    "negative size": "sizes or strides",
    "expanded payload": "elements out of 16 bytes|takes",
    "type of numbers": "type of numbers",
    "sparse": "layout",
    "declared otherwise": r"declared as float32\[1\] and stored as float32\[4\]",
    "declared as whole numbers": r"declared as int64\[4\] and stored",
    "missing weight": "not stored|cannot be loaded",
    "power": "exponent",
    "shift": "exponent",
    "list times number": "takes numbers",
    "device": "exported on the device 'meta'",
    "precision": "expr_str",
    "deep": "nested more than",
    "key twice": "is there twice",
    "not a number": "NaN is not JSON",
    "number of many digits": "more than 64 bits",
    "module of a node": "is not a name",
    "name of a weight": "is not a name",
    "many expressions": "characters of symbolic expressions",
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_hostile_program_is_refused_before_it_does_harm(kind: str) -> None:
    """By the loader; an index out of range by the kernel that checks it, in the first run."""
    with pytest.raises(InputError, match=HOSTILE[kind]) as caught:
        loaded, inputs, _ = load_exported(hostile(kind), "evil.pt2")
        assert kind in ("index of a table", "gather"), "loaded"
        capture(loaded, inputs)
    assert "\n" not in str(caught.value)


class Decomposed(nn.Module):
    """What core ATen makes of it: kernels that do not check, and fills of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.groups = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.layer, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.norm(self.conv(x)).relu()).flatten(2).transpose(1, 2)
        x = self.layer(x)
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return self.linear(x.masked_fill(x > 9, float("-inf")))


@pytest.mark.parametrize("kind", ["exported", "decomposed"])
def test_an_honest_program_gives_what_torch_gives(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Decomposed().eval(), torch.randn(2, 3, 6, 6)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    loaded, inputs, stored = load_exported(
        as_bytes(exported if kind == "exported" else exported.run_decompositions()), "m.pt2"
    )
    assert stored and torch.equal(inputs[0], x)
    wider = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(check_guards=False)(wider), model(wider))
    called = {str(node.target) for node in loaded.graph_module.graph.nodes if node.op == "call_function"}
    assert "aten._native_batch_norm_legit_no_training.default" not in called and "aten.batch_norm.default" in called


def test_no_overload_that_writes_elsewhere_draws_or_takes_objects_is_admitted() -> None:
    for name in (
        "add.out",
        "add.t",
        "mul.left_t",
        "rand.default",
        "bernoulli.default",
        "scatter_.src",
        "index_put_.default",
        "resize_.default",
        "set_.source_Tensor",
        "_embedding_bag.default",
        "native_batch_norm.default",
        "embedding_renorm_.default",
        "empty_strided.default",
        "convolution_backward.default",
        "_fft_c2r.default",
        "_cdist_backward.default",
        "from_file.default",
        "sort.dimname",
    ):
        packet, overload = name.split(".")
        found = getattr(getattr(aten, packet), overload, None)
        assert found is None or not is_safe_operator(found), name


LEAST = torch.tensor([-(2**63), 5])
DIVISIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {  # of the least integer by -1, or by zero
    "div": (lambda x, a: x.sum() + a.div(-1, rounding_mode="trunc"), (LEAST,)),
    "div by zero": (lambda x, a: x.sum() + a.div(0, rounding_mode="floor"), (LEAST,)),
    "floor_divide": (lambda x, a: x.sum() + a // -1, (LEAST,)),
    "remainder": (lambda x, a: x.sum() + a % -1, (LEAST,)),
    "fmod": (lambda x, a: x.sum() + a.fmod(-1), (LEAST,)),
    "by a tensor of the file": (lambda x, a, b: x.sum() + a // b, (LEAST, torch.tensor([-1, 1]))),
    "through a view": (lambda x, a, b: x.sum() + a // b.view(2, 1)[1:], (LEAST, torch.tensor([1, 0]))),
    "by what is computed": (lambda x, a, b: x.sum() + a // (b - 2), (LEAST, torch.tensor([1, 1]))),
    "by what another node writes": (lambda x, a, b: x.sum() + a // b + b.sub_(2), (LEAST, torch.tensor([1, 1]))),
    "by the difference of sizes": (lambda x, a: x.sum() + a // (x.shape[0] - 3), (LEAST,)),
    "of a pool": (lambda x, a: x.sum() + aten.avg_pool2d(a, [1, 1], [1, 1], [0, 0], False, True, -1),
                  (LEAST.expand(1, 1, 2, 2).contiguous(),)),
}


def unsafe(kind: str) -> bytes:
    """A program with such a division, saved without being run."""
    function, tensors = DIVISIONS[kind]
    x, shapes = torch.ones(2, 4), ({0: torch.export.Dim.DYNAMIC},) if "sizes" in kind else None
    with torch.no_grad():
        return as_bytes(torch.export.export(Calls(function, tensors), (x,), dynamic_shapes=shapes))


@pytest.mark.parametrize("kind", list(DIVISIONS))
def test_a_division_that_ends_the_process_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match=r"divides integers by|divisor is not above 0"):
        load_exported(unsafe(kind), "evil.pt2")


def test_groups_that_are_none_are_refused() -> None:
    data = edited(program(lambda x: aten.native_channel_shuffle(x, 2), x=IMAGE), _set("groups", {"as_int": 0}))
    with pytest.raises(InputError, match="groups do not divide"):
        load_exported(data, "evil.pt2")


def test_honest_divisions() -> None:
    """By numbers, by sizes and by tensors of the file; of floats by anything."""
    def divides(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        sizes = a // (x.shape[0] * x.shape[1]) + a.div(x.shape[0], rounding_mode="trunc") + (x.shape[0] + 3) // 2
        return sizes + a // 2 + a % 3 + a // b.unsqueeze(0) + (x / x.mean()).sum() + (x // -1.0).sum()

    tensors = torch.tensor([7, 9]), torch.tensor([2, 3])
    free = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(Calls(divides, tensors), (torch.ones(2, 4),), dynamic_shapes=free)
    loaded, inputs, _ = load_exported(as_bytes(exported), "m.pt2")
    assert torch.equal(loaded.module(check_guards=False)(*inputs), divides(*inputs, *tensors))


def test_constants_are_checked_like_weights() -> None:
    table = torch.arange(4.0)
    data = program(lambda x: x + table)
    assert json.loads(records_of(data)[CONSTANTS])["config"]
    load_exported(data, "m.pt2")

    def longer(document: Any) -> None:
        next(iter(document["config"].values()))["tensor_meta"]["sizes"] = [{"as_int": 4000}]

    with pytest.raises(InputError, match="bytes but stores"):
        load_exported(edited(data, longer, CONSTANTS), "m.pt2")


def test_inputs_that_are_not_what_the_program_declares() -> None:
    records = records_of(saved(nn.Linear(4, 3), torch.ones(2, 4)))
    other = records_of(saved(nn.Linear(5, 3), torch.ones(2, 5)))
    name = "data/sample_inputs/model.pt"
    with pytest.raises(InputError, match="declared as float32"):
        load_exported(archive_of({**records, name: other[name]}), "m.pt2")
