"""Strategies: small models out of every kind of layer, put together in any order that torch itself can run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from small_blocks import block
from small_data import WIDE, batches_of, inputs_of, recipes
from small_functions import plain
from small_layers import SIZES, Draw, call, constant, joined, weighted
from torch import Tensor, nn

from repquant_fx import Recipe

Operands = tuple[int, ...]  # positions of the values that a step reads
Steps = list[tuple[str, Operands]]
Layers = dict[str, nn.Module]
KINDS = [*["weighted"] * 3, *["block"] * 2, *["plain"] * 3, *["joined"] * 2, "constant", "again"]
LIMIT = 1 << 12  # elements of a value
RESULTS = ["tensor", "tuple", "dict", "list", "nested", "with others"]
NAMES = st.sampled_from(
    ["fc", "fc_0", "_fc", "val_0", "tmp_1", "const", "scalar_x", "quantizers", "linear", "weight", "x", "input",
     "fc_input", "0", "output", "mul", "é", "class_", "add", "a b", "getattr", "mask_closed", "fc_input_scale",
     "L__self__"]
)


@dataclass(frozen=True)
class Case:
    """A model, example inputs (one tensor per input), calibration batches and a recipe.

    `form` is what the compiler is given: the module, or an ExportedProgram of it.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    batches: list[tuple[Tensor, ...]]
    recipe: Recipe
    form: str = "module"

    def __repr__(self) -> str:
        shapes = ", ".join(f"{tuple(t.shape)} {t.stride()} {str(t.dtype).removeprefix('torch.')}" for t in self.inputs)
        floats = [[t for t in batch if t.is_floating_point() and t.numel()] for batch in self.batches]
        samples = [(len(b[0]), *(f"{float(t.abs().max()):.3g}" for t in f)) for b, f in zip(self.batches, floats)]
        return f"{self.model.text}\n  inputs {shapes}; samples {samples}; as {self.form}; {self.recipe}"


class Model(nn.Module):
    """Layers applied to earlier values: value `len(inputs) + i` is what step i gives."""

    def __init__(self, steps: Steps, layers: Layers, outputs: list[int], kind: str) -> None:
        super().__init__()
        self.steps, self.outputs, self.kind = steps, outputs, kind
        for name, layer in layers.items():
            self.add_module(name, layer)

    def run(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for name, operands in self.steps:
            values.append(self._modules[name](*[values[i] for i in operands]))
        results = [values[i] for i in self.outputs]
        if self.kind == "dict":
            return {f"out_{i}": value for i, value in enumerate(results)}
        if self.kind == "nested":
            return {"first": results[:1], "rest": (results[1:], {"again": results[0]} if results else {})}
        if self.kind == "with others":
            return (*results, None, 3)
        return results[0] if self.kind == "tensor" else list(results) if self.kind == "list" else tuple(results)

    @property
    def text(self) -> str:
        lines = [f"  {name}{list(operands)}: {self._modules[name]}" for name, operands in self.steps]
        return "\n".join([f"model {type(self).__name__}", *lines, f"  outputs {self.outputs} as {self.kind}"])


class One(Model):
    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class Two(Model):
    def forward(self, x: Tensor, val_0: Tensor) -> Any:
        return self.run(x, val_0)


class Optional(Model):
    def forward(self, input: Tensor, mask: Tensor | None = None, flag: bool = True) -> Any:
        return self.run(*(t for t in (input, mask) if t is not None and flag))


class Many(Model):
    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


@st.composite
def cases(draw: Any) -> Case:
    """A case whose model runs on its example inputs."""
    torch.manual_seed(0)
    inputs = draw(inputs_of())
    values, steps, layers = [t.clone() for t in inputs], Steps(), Layers()
    wanted = ["before", "first linear"] + [draw(st.sampled_from(KINDS)) for _ in range(draw(st.integers(0, 7)))]
    for chosen in wanted:
        made = step(draw, chosen, values, steps, layers)
        if made is not None:
            name, operands, result = made
            steps.append((name, operands))
            values.append(result)
    model = put_together(draw, values, steps, layers, len(inputs))
    tie(draw, model)
    if draw(st.integers(0, 11)) == 0:
        model = model.to(draw(st.sampled_from(WIDE)))
    if draw(st.integers(0, 7)) == 0:
        model.register_parameter("unused", nn.Parameter(torch.randn(2)))
    form = draw(st.sampled_from([*["module"] * 7, "program"]))
    return Case(model.eval(), inputs, draw(batches_of(inputs)), draw(recipes()), form)


def step(
    draw: Draw, chosen: str, values: list[Tensor], steps: Steps, layers: Layers
) -> tuple[str, Operands, Tensor] | None:
    """One more layer, added to `layers`: its name, what it reads, and what it gives; None where it does not run."""
    last = len(values) - 1
    at = last if draw(st.integers(0, 3)) else draw(st.integers(0, last))
    name, operands = draw(NAMES), (at,)
    while name in layers:
        name += "_0"
    fitting = [i for i, value in enumerate(values) if value.is_floating_point() and value.ndim]
    if chosen == "before":  # what brings integers and numbers into the form that a Linear takes
        if fitting:
            return None
        layer: nn.Module = nn.Embedding(5, 4) if values[0].dtype == torch.int64 else call("float", _as_float)
        operands = (0,)
    elif chosen == "first linear":
        operands = (draw(st.sampled_from(fitting)),)
        layer = nn.Linear(values[operands[0]].shape[-1], draw(SIZES), dtype=values[operands[0]].dtype)
    elif chosen == "again" and steps:
        name, like = draw(st.sampled_from(steps))
        operands, layer = (at,) * len(like), layers[name]
    elif chosen == "joined":
        operands, layer = (at, draw(st.integers(0, last))), joined(draw)
    elif chosen == "constant":
        operands, layer = (), constant(draw)
    else:
        try:
            layer = {"weighted": weighted, "block": block}.get(chosen, plain)(draw, values[at])
        except (ValueError, RuntimeError, ZeroDivisionError, AssertionError):
            return None  # torch makes no such layer
    result = attempt(layer, [values[i] for i in operands])
    if result is None:
        return None
    layers[name] = layer
    return name, operands, result


def _as_float(x: Tensor) -> Tensor:
    return x.float()[..., None]


def put_together(draw: Draw, values: list[Tensor], steps: Steps, layers: Layers, inputs: int) -> Model:
    """The model of these steps; the first Linear's result is nearly always an output: something is quantized."""
    some = draw(st.integers(0, 3)) == 0
    outputs = draw(st.lists(st.integers(0, len(values) - 1), max_size=3)) if some else [len(values) - 1]
    first = next((inputs + i for i, (name, _) in enumerate(steps) if isinstance(layers[name], nn.Linear)), None)
    if first is not None and draw(st.integers(0, 7)):
        outputs = [*outputs, first]
    if outputs and draw(st.integers(0, 7)) == 0:
        outputs = [*outputs, outputs[-1]]
    kind = draw(st.sampled_from(RESULTS if len(outputs) == 1 else RESULTS[1:]))
    model_class = draw(st.sampled_from([Many, *{1: [One, Optional], 2: [Two, Optional]}.get(inputs, [])]))
    model = model_class(steps, layers, outputs, kind)
    assert isinstance(model, Model)
    return model


def attempt(layer: nn.Module, operands: list[Tensor]) -> Tensor | None:
    """What a layer gives; None where torch cannot run it, or it is no tensor of a modest size."""
    try:
        with torch.no_grad():
            result = layer.eval()(*[t.clone() for t in operands])
    except Exception:
        return None
    return result if isinstance(result, Tensor) and result.numel() <= LIMIT else None


def tie(draw: Draw, model: nn.Module) -> None:
    """Sometimes one weight for two layers, of a Linear or a table, as it is or turned."""
    owners: list[Any] = [m for m in model.modules() if type(m) in (nn.Linear, nn.Embedding)]  # no parametrized ones
    for first, second in pairwise(owners):
        if first.weight.dtype != second.weight.dtype or not draw(st.booleans()):
            continue
        if first.weight.shape == second.weight.shape:
            second.weight = first.weight
        elif first.weight.shape == second.weight.shape[::-1] and isinstance(second, nn.Linear):
            second.weight = nn.Parameter(first.weight.t())

