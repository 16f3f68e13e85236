"""Strategies: small models out of every kind of layer, put together in any order that torch itself can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from repquant_fx import Recipe

Draw = Callable[[st.SearchStrategy[Any]], Any]
KINDS = [*["weighted"] * 3, *["plain"] * 3, *["joined"] * 2, "constant", "again"]
LIMIT = 1 << 12  # elements of a value
SIZES = st.sampled_from([4, 4, 8, 8, 3, 2, 2, 1, 1, 0])
NAMES = st.sampled_from(
    [
        "fc",
        "fc_0",
        "_fc",
        "val_0",
        "tmp_1",
        "const",
        "scalar_x",
        "quantizers",
        "linear",
        "weight",
        "x",
        "input",
        "fc_input",
        "0",
        "output",
        "mul",
        "é",
        "class_",
        "add",
    ]
)
WIDE = (torch.float64, torch.float16, torch.bfloat16)
DTYPES = st.sampled_from([*[torch.float32] * 12, *WIDE])


@dataclass(frozen=True)
class Case:
    """A model, example inputs (one tensor per input), calibration batches and a recipe."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    batches: list[tuple[Tensor, ...]]
    recipe: Recipe

    def __repr__(self) -> str:
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in self.inputs)
        return f"{self.model.text}\n  inputs {shapes}; {[len(b[0]) for b in self.batches]} samples; {self.recipe}"


class Call(nn.Module):
    """A function as a layer, with the tensors it needs."""

    def __init__(self, function: Callable[..., Tensor], text: str, **tensors: Tensor) -> None:
        super().__init__()
        self.function, self.text = function, text
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor)) if tensor.is_floating_point() else self.register_buffer(
                name, tensor
            )

    def forward(self, *operands: Tensor) -> Tensor:
        return self.function(*operands, **{**self._parameters, **self._buffers})

    def extra_repr(self) -> str:
        return self.text


class Model(nn.Module):
    """Layers applied to earlier values: value `len(inputs) + i` is what step i gives."""

    def __init__(
        self, steps: list[tuple[str, tuple[int, ...]]], layers: dict[str, nn.Module], outputs: list[int], kind: str
    ) -> None:
        super().__init__()
        self.steps, self.outputs, self.kind = steps, outputs, kind
        for name, layer in layers.items():
            self.add_module(name, layer)

    def run(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for name, operands in self.steps:
            values.append(getattr(self, name)(*[values[i] for i in operands]))
        results = [values[i] for i in self.outputs]
        if self.kind == "dict":
            return {f"out_{i}": value for i, value in enumerate(results)}
        return results[0] if self.kind == "tensor" else tuple(results)

    @property
    def text(self) -> str:
        lines = [f"  {name}{list(operands)}: {getattr(self, name)}" for name, operands in self.steps]
        return "\n".join(["model", *lines, f"  outputs {self.outputs} as {self.kind}"])


class One(Model):
    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class Two(Model):
    def forward(self, x: Tensor, val_0: Tensor) -> Any:
        return self.run(x, val_0)


class Many(Model):
    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


def call(text: str, function: Callable[..., Tensor], **tensors: Tensor) -> Call:
    return Call(function, text, **tensors)


def axis_of(draw: Draw, x: Tensor) -> int:
    return int(draw(st.integers(-x.ndim, x.ndim - 1))) if x.ndim else 0


def weighted(draw: Draw, x: Tensor) -> nn.Module:
    """A layer with parameters that reads `x`."""
    width = x.shape[-1] if x.ndim else 1
    kind = draw(
        st.sampled_from(
            [
                *["linear"] * 5,
                "matmul",
                "addmm",
                "conv1d",
                "conv2d",
                "layernorm",
                "rms",
                "rms_norm",
                "batchnorm",
                "embedding",
                "scale",
                "mlp",
            ]
        )
    )
    out, bias = draw(SIZES), draw(st.booleans())
    if kind == "linear":
        layer = nn.Linear(width, out, bias=bias)
        if out and width and draw(st.booleans()):
            layer.weight = nn.Parameter(torch.randn(width, out).t())  # not contiguous
        return layer
    if kind == "matmul":
        return call("x @ w", lambda x, w: x @ w, w=torch.randn(width, out))
    if kind == "addmm":
        return call("addmm(x, x, w)", lambda x, w: torch.addmm(x, x, w), w=torch.randn(width, width))
    if kind == "conv1d":
        kernel, step = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        return nn.Conv1d(
            x.shape[-2] if x.ndim > 1 else 1, max(1, out), kernel, step, padding=draw(st.integers(0, 1)), bias=bias
        )
    if kind == "conv2d":
        kernel = draw(st.integers(1, 2))
        return nn.Conv2d(
            x.shape[-3] if x.ndim > 2 else 1,
            max(1, out),
            kernel,
            draw(st.integers(1, 2)),
            padding=draw(st.integers(0, 1)),
            bias=bias,
        )
    if kind == "layernorm":
        return nn.LayerNorm(list(x.shape[-draw(st.integers(1, 2)) :]), elementwise_affine=bias)
    if kind == "rms":
        return call(
            "rms by hand",
            lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
            w=torch.rand(width) + 0.5,
        )
    if kind == "rms_norm":
        return nn.RMSNorm(width, eps=1e-6)
    if kind == "batchnorm":
        return nn.BatchNorm1d(x.shape[1] if x.ndim > 1 else 1)
    if kind == "embedding":
        return nn.Embedding(5, max(1, out))
    if kind == "scale":
        return call("x * w + w", lambda x, w: x * w + w, w=torch.randn(width))
    return nn.Sequential(
        nn.Linear(width, 4, bias=bias), draw(st.sampled_from([nn.GELU(), nn.ReLU(), nn.SiLU()])), nn.Linear(4, width)
    )


def plain(draw: Draw, x: Tensor) -> nn.Module:
    """A function of `x` alone."""
    axis, number = axis_of(draw, x), draw(st.integers(-2, 3))
    shape = list(x.shape)
    order = list(draw(st.permutations(range(x.ndim))))
    grown = draw(st.sampled_from([(1, 1), (0, 2), (1, 0, 1, 0), (0, 0)]))
    repeat = draw(st.sampled_from([0.5, 0.0, 30.0, 1e-8]))
    table: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: torch.softmax(x, axis),
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": F.silu,
        "tanh": torch.tanh,
        "mean": lambda x: x.mean(axis),
        "mean keepdim": lambda x: x.mean(axis, keepdim=True),
        "sum": lambda x: x.sum(axis),
        "amax": lambda x: x.amax(axis),
        "max": lambda x: x.max(axis)[0],
        "argmax": lambda x: x.argmax(axis),
        "cumsum": lambda x: x.cumsum(axis),
        "reduce all": torch.mean,
        "permute": lambda x: x.permute(order),
        "transpose": lambda x: x.transpose(axis, 0),
        "flatten": lambda x: x.flatten(1),
        "heads": lambda x: x.unflatten(-1, (2, -1)),
        "view": lambda x: x.view(x.shape[0], -1),
        "reshape": lambda x: x.reshape(shape[0] if shape else 1, 1, -1),
        "unsqueeze": lambda x: x.unsqueeze(axis),
        "squeeze": lambda x: x.squeeze(axis),
        "slice": lambda x: x[:, number:],
        "first": lambda x: x[:, 0],
        "ellipsis": lambda x: x[..., :1],
        "step": lambda x: x[..., ::2],
        "empty slice": lambda x: x[:, :0],
        "chunk": lambda x: x.chunk(2, axis)[-1],
        "unbind": lambda x: x.unbind(1)[0],
        "pad": lambda x: F.pad(x, grown),
        "roll": lambda x: torch.roll(x, number, axis),
        "flip": lambda x: x.flip(axis),
        "pool1d": lambda x: F.avg_pool1d(x, 2),
        "adaptive": lambda x: F.adaptive_avg_pool1d(x, 1),
        "adaptive2d": lambda x: F.adaptive_avg_pool2d(x, 1),
        "pool2d": lambda x: F.max_pool2d(x, 2),
        "times": lambda x: x * repeat,
        "add": lambda x: x + number,
        "negate": lambda x: -x,
        "gate": lambda x: x.chunk(2, -1)[0] * torch.sigmoid(x.chunk(2, -1)[1]),
        "clone": lambda x: x.clone(),
        "detach": lambda x: x.detach(),
        "identity": lambda x: x,
        "long": lambda x: x.abs().long().clamp(0, 4),
        "float": lambda x: x.float(),
        "double": lambda x: x.double(),
        "half": lambda x: x.half().float(),
        "mask": lambda x: x > 0,
        "expand": lambda x: x.unsqueeze(0).expand(2, *x.shape),
        "nonzero": lambda x: x.nonzero(),
        "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        "masked": lambda x: x.masked_fill(x < 0, float("-inf")),
        "dropout": lambda x: F.dropout(x, 0.5, training=False),
        "normalize": lambda x: F.normalize(x, dim=-1),
        "in place": lambda x: x.clone().add_(1),
        "size": lambda x: x * x.shape[0],
        "zeros": lambda x: x * 0,
        "sqrt": lambda x: x.sqrt(),
        "item": lambda x: x * float(x.sum()),
        "branch": lambda x: x if x.sum() > 0 else -x,
        "random": lambda x: x + torch.rand_like(x),
        "ones": torch.ones_like,
        "topk": lambda x: x.topk(1)[0],
    }
    name = draw(st.sampled_from(list(table)))
    return call(f"{name} (axis {axis}, number {number}, order {order}, pad {grown}, factor {repeat})", table[name])


def joined(draw: Draw) -> nn.Module:
    """A function of two values."""
    table: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "sub": lambda a, b: a - b,
        "matmul": torch.matmul,
        "concat": lambda a, b: torch.cat([a, b], -1),
        "concat 1": lambda a, b: torch.cat([a, b], 1),
        "scores": lambda a, b: a @ b.transpose(-2, -1),
        "attention": lambda a, b: torch.softmax(a @ b.transpose(-2, -1) / 2, -1) @ b,
        "sdpa": lambda a, b: F.scaled_dot_product_attention(a, b, b),
        "causal": lambda a, b: F.scaled_dot_product_attention(a, b, b, is_causal=True),
        "self": lambda a, b: F.scaled_dot_product_attention(a, a, a),
        "masked sdpa": lambda a, b: F.scaled_dot_product_attention(a, a, a, attn_mask=b > 0),
        "linear": lambda a, b: F.linear(a, b),
        "einsum": lambda a, b: torch.einsum("bij,bkj->bik", a, b),
        "einsum 2": lambda a, b: torch.einsum("ij,kj->ik", a, b),
        "where": lambda a, b: torch.where(b > 0, a, b),
        "bmm": torch.bmm,
        "stack": lambda a, b: torch.stack([a, b], 1),
        "take": lambda a, b: a[b.long() % 2],
        "masked": lambda a, b: a.masked_fill(b > 0, -1e4),
        "div": lambda a, b: a / (b.abs() + 1),
        "gather": lambda a, b: torch.gather(a, -1, b.long()),
        "addmm": lambda a, b: torch.addmm(b, a, a),
        "first": lambda a, b: a,
        "conv": lambda a, b: F.conv1d(a, b),
        "outer": lambda a, b: a[..., None] * b,
    }
    name = draw(st.sampled_from(list(table)))
    return call(name, table[name])


def constant(draw: Draw) -> nn.Module:
    """No operand: a parameter, or something computed of one."""
    shape = draw(st.lists(SIZES, max_size=3))
    tensor = torch.randn(shape)
    if draw(st.booleans()):
        return call("a parameter", lambda w: w, w=tensor)
    return call("arange", lambda: torch.arange(4))


@st.composite
def inputs_of(draw: Any) -> tuple[Tensor, ...]:
    """Example inputs: 1 to 3, float, integer or boolean; a common first axis of 2 (or 1, or 0)."""
    batch = draw(st.sampled_from([*[2] * 12, 1, 0]))
    made = []
    for index in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        shape = [batch, *draw(st.lists(SIZES, min_size=index == 0, max_size=3))]
        kind = (
            draw(st.sampled_from(["float"] * 7 + ["int", "bool", "wide"]))
            if index == 0
            else draw(st.sampled_from(["float", "float", "int", "bool"]))
        )
        made.append(
            fresh(
                shape,
                torch.int64
                if kind == "int"
                else torch.bool
                if kind == "bool"
                else draw(DTYPES)
                if kind == "wide"
                else torch.float32,
                index,
            )
        )
    return tuple(made)


def fresh(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 2
    return (
        (values.abs() * 2).long().clamp(0, 4)
        if dtype == torch.int64
        else values > 0
        if dtype == torch.bool
        else values.to(dtype)
    )


@st.composite
def recipes(draw: Any) -> Recipe:
    bits = st.integers(2, 8)
    return Recipe(
        wbits=draw(bits),
        abits=draw(bits),
        norm=draw(st.sampled_from(["reparameterize", "layerwise", "channelwise", "smooth"])),
        softmax=draw(st.sampled_from(["log", "log_sqrt2", "log2", "uniform"])),
        container=draw(st.sampled_from(["int8", "int8", "int4"])),
        softmax_scale=draw(st.sampled_from(["output", "percentile"])),
        correction=draw(st.booleans()),
        gptq=draw(st.booleans()),
        activations=draw(st.sampled_from(["mse", "percentile", "minmax"])),
        clipping=draw(st.sampled_from(["search", "none"])),
    )


@st.composite
def cases(draw: Any) -> Case:
    """A case whose model runs on its example inputs."""
    torch.manual_seed(0)
    inputs = draw(inputs_of())
    values, steps, layers = [t.clone() for t in inputs], [], dict[str, nn.Module]()
    for _ in range(draw(st.integers(1, 8))):
        chosen = draw(st.sampled_from(KINDS)) if steps else "linear"
        last = len(values) - 1
        at = last if draw(st.integers(0, 3)) else draw(st.integers(0, last))
        operands: tuple[int, ...] = (at,)
        name = draw(NAMES)
        while name in layers:
            name += "_0"
        if chosen == "again" and steps:
            name = draw(st.sampled_from([n for n, _ in steps]))
            operands = (
                ()
                if not next(o for n, o in steps if n == name)
                else (at,) * len(next(o for n, o in steps if n == name))
            )
            layer = layers[name]
        elif chosen == "joined":
            operands, layer = (at, draw(st.integers(0, last))), joined(draw)
        elif chosen == "constant":
            operands, layer = (), constant(draw)
        elif chosen == "linear":
            layer = nn.Linear(values[at].shape[-1], draw(SIZES))
        else:
            layer = weighted(draw, values[at]) if chosen == "weighted" else plain(draw, values[at])
        result = attempt(layer, [values[i] for i in operands])
        if result is not None:
            layers[name] = layer
            steps.append((name, operands))
            values.append(result)
    outputs = (
        draw(st.lists(st.integers(0, len(values) - 1), max_size=3))
        if draw(st.integers(0, 3)) == 0
        else [len(values) - 1]
    )
    if outputs and steps and draw(st.integers(0, 2)):
        outputs = [*outputs, len(inputs)]  # the first Linear's result: there is something to quantize
    if outputs and draw(st.integers(0, 7)) == 0:
        outputs = [*outputs, outputs[-1]]
    kind = (
        draw(st.sampled_from(["tensor", "tuple", "dict"]))
        if len(outputs) == 1
        else draw(st.sampled_from(["tuple", "dict"]))
    )
    model_class = draw(st.sampled_from([Many, {1: One, 2: Two}.get(len(inputs), Many)]))
    model = model_class(steps, layers, outputs, kind)
    tie(draw, model)
    if draw(st.integers(0, 11)) == 0:
        model = model.to(draw(st.sampled_from(WIDE)))
    if draw(st.integers(0, 7)) == 0:
        model.register_parameter("unused", nn.Parameter(torch.randn(2)))
    samples = draw(st.sampled_from([2, 4, 20]))
    batches = [
        tuple(
            fresh([samples if t.shape[0] == 2 else t.shape[0], *t.shape[1:]], t.dtype, seed * 8 + i)
            for i, t in enumerate(inputs)
        )
        for seed in range(1, draw(st.integers(2, 3)))
    ]
    return Case(model.eval(), inputs, batches, draw(recipes()))


def attempt(layer: nn.Module, operands: list[Tensor]) -> Tensor | None:
    """What a layer gives; None where torch cannot run it, or it is no tensor of a modest size."""
    try:
        with torch.no_grad():
            result = layer.eval()(*[t.clone() for t in operands])
    except Exception:
        return None
    return result if isinstance(result, Tensor) and result.numel() <= LIMIT else None


def tie(draw: Draw, model: nn.Module) -> None:
    """Sometimes one weight for two Linears of a shape."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for first, second in pairwise(linears):
        if first.weight.shape == second.weight.shape and draw(st.booleans()):
            second.weight = first.weight
