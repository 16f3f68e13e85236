"""Layers and functions of every kind, as the strategies draw them for a value that they shall read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Draw = Callable[[st.SearchStrategy[Any]], Any]
SIZES = st.sampled_from([*[4] * 6, *[8] * 5, *[3] * 3, *[2] * 5, *[1] * 4, 0])
WEIGHTED = [
    *["linear"] * 5, "matmul", "addmm", "baddbmm", "conv1d", "conv2d", "same", "transposed", "layernorm", "rms",
    "rms_norm", "batchnorm", "groupnorm", "embedding", "scale", "scale in double", "scale in half", "mlp",
    "mlp in double", "prelu", "lookup", "written",
]


class Call(nn.Module):
    """A function as a layer, with the tensors it needs."""

    def __init__(self, function: Callable[..., Tensor], text: str, **tensors: Tensor) -> None:
        super().__init__()
        self.function, self.text = function, text
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, *operands: Tensor) -> Tensor:
        return self.function(*operands, **{**self._parameters, **self._buffers})

    def extra_repr(self) -> str:
        return self.text


def call(text: str, function: Callable[..., Tensor], **tensors: Tensor) -> Call:
    return Call(function, text, **tensors)


def weighted(draw: Draw, x: Tensor) -> nn.Module:
    """A layer with parameters that reads `x`, in the precision of `x` where that is a float."""
    layer = _weighted(draw, x)
    if x.is_floating_point() and x.dtype != torch.float32 and draw(st.booleans()):
        layer = layer.to(x.dtype)
    return layer


def _weighted(draw: Draw, x: Tensor) -> nn.Module:
    width = x.shape[-1] if x.ndim else 1
    kind = draw(st.sampled_from(WEIGHTED))
    out, bias = draw(SIZES), draw(st.booleans())
    if kind == "linear":
        layer = nn.Linear(width, out, bias=bias)
        if out and width:
            layer.weight = nn.Parameter(_laid_out(draw, layer.weight.detach().clone()))
        return layer
    if kind == "matmul":
        return call("x @ w", lambda x, w: x @ w, w=torch.randn(width, out))
    if kind == "addmm":
        return call("addmm(x, x, w)", lambda x, w: torch.addmm(x, x, w), w=torch.randn(width, width))
    if kind == "baddbmm":
        return call("baddbmm(b, x, w)", lambda x, b, w: torch.baddbmm(b, x, w.expand(x.shape[0], -1, -1)),
                    b=torch.randn(out), w=torch.randn(width, out))
    if kind in ("conv1d", "conv2d", "same", "transposed"):
        return _convolution(draw, x, kind, max(1, out), bias)
    if kind == "layernorm":
        return nn.LayerNorm(list(x.shape[-draw(st.integers(1, 2)) :]), elementwise_affine=bias)
    if kind == "rms":
        return call("rms by hand", lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
                    w=torch.rand(width) + 0.5)
    if kind == "rms_norm":
        return nn.RMSNorm(width, eps=1e-6)
    if kind == "batchnorm":
        return (nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d)(x.shape[1] if x.ndim > 1 else 1)
    if kind == "groupnorm":
        return nn.GroupNorm(1, x.shape[1] if x.ndim > 1 else 1)
    if kind == "embedding":
        return nn.Embedding(5, max(1, out))
    if kind == "scale":
        return call("x * w + w", lambda x, w: x * w + w, w=torch.randn(width))
    if kind == "scale in double":
        axes = draw(st.sampled_from([(), (1,), (1, 1)]))
        return call("x * w", lambda x, w: x * w, w=torch.randn(*axes, width).double())
    if kind == "scale in half":
        return call("x * w", lambda x, w: x * w, w=torch.randn(width).half())
    if kind == "mlp in double":
        return call(kind, _mlp_in_double, w=torch.randn(4, width), v=torch.randn(4, 4))
    if kind == "prelu":
        return nn.PReLU(x.shape[1] if bias and x.ndim > 1 else 1)
    if kind == "lookup":
        return call("x[..., w]", lambda x, w: x[..., w], w=torch.arange(width).flip(0).repeat(2))
    if kind == "written":
        return call("a slice is written", lambda x, w: x.clone().index_fill_(-1, w, 0.0), w=torch.zeros(1).long())
    return nn.Sequential(
        nn.Linear(width, 4, bias=bias), draw(st.sampled_from([nn.GELU(), nn.ReLU(), nn.SiLU(), nn.ReLU(inplace=True)])),
        nn.Dropout(0.5), nn.Linear(4, width))


def _mlp_in_double(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x.double(), w.double())), v.double()).to(x.dtype)


def _convolution(draw: Draw, x: Tensor, kind: str, out: int, bias: bool) -> nn.Module:
    kernel, step, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    if kind == "conv1d":
        return nn.Conv1d(x.shape[-2] if x.ndim > 1 else 1, out, kernel, step, padding, bias=bias)
    channels = x.shape[-3] if x.ndim > 2 else 1
    if kind == "conv2d":
        return nn.Conv2d(channels, out, kernel, step, padding, dilation=draw(st.integers(1, 2)), bias=bias)
    if kind == "same":
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        return nn.Conv2d(channels, out, kernel, padding="same", padding_mode=mode, bias=bias)
    return nn.ConvTranspose2d(channels, out, kernel, step, bias=bias)


def _laid_out(draw: Draw, weight: Tensor) -> Tensor:
    """The weight, or one of its shape that lies in memory or is made otherwise."""
    how = draw(st.sampled_from([*["as it is"] * 40, "turned", "strided", "expanded", "part", *EXTREMES]))
    if how == "turned":
        return weight.t().contiguous().t()
    if how == "strided":
        return torch.randn(weight.shape[0], 2 * weight.shape[1])[:, ::2]
    if how == "expanded":
        return weight[:1].expand_as(weight)
    if how == "part":
        return torch.cat([weight, weight])[len(weight) :]
    return EXTREMES[how](weight) if how in EXTREMES else weight


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda w: w * 0, "equal": lambda w: torch.full_like(w, 0.3), "huge": lambda w: w * 1e15,
    "a zero row": lambda w: w * (torch.arange(len(w)) > 0)[:, None], "larger": lambda w: w * 1e30,
    "tiny": lambda w: w * 1e-20, "denormal": lambda w: w * 1e-42,
    "an outlier": lambda w: w + torch.eye(*w.shape) * 1e4, "negative": lambda w: -w.abs() - 0.1,
    "not finite": lambda w: w / (torch.arange(len(w)) > 0)[:, None],
}


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
        "other attention": lambda a, b: a @ torch.softmax(a.transpose(-2, -1) @ b, -2),
        "cosine": lambda a, b: F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(-2, -1),
        "sdpa": lambda a, b: F.scaled_dot_product_attention(a, b, b),
        "causal": lambda a, b: F.scaled_dot_product_attention(a, b, b, is_causal=True),
        "self": lambda a, b: F.scaled_dot_product_attention(a, a, a),
        "masked sdpa": lambda a, b: F.scaled_dot_product_attention(a, a, a, attn_mask=b > 0),
        "added sdpa": lambda a, b: F.scaled_dot_product_attention(a, a, a, attn_mask=b, scale=0.3),
        "linear": lambda a, b: F.linear(a, b),
        "einsum": lambda a, b: torch.einsum("bij,bkj->bik", a, b),
        "einsum 2": lambda a, b: torch.einsum("ij,kj->ik", a, b),
        "einsum 3": lambda a, b: torch.einsum("bi,bj->bij", a, b),
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
        "maximum": torch.maximum,
        "and": lambda a, b: (a > 0) & (b > 0),
        "equal": lambda a, b: a == b,
        "written": lambda a, b: a.clone().copy_(b),
        "added in place": lambda a, b: (a * 1).add_(b),
        "layer norm": lambda a, b: F.layer_norm(a, b.shape[-1:], b.flatten()[: b.shape[-1]]),
        "residual norm": lambda a, b: F.layer_norm(a + b, a.shape[-1:]),
        "as": lambda a, b: a.type_as(b),
        "view as": lambda a, b: a.view_as(b),
        "index": lambda a, b: a.index_select(0, b.flatten().long() % a.shape[0]),
        "pick": lambda a, b: a[b > 0],
    }
    name = draw(st.sampled_from(list(table)))
    return call(name, table[name])


def constant(draw: Draw) -> nn.Module:
    """No operand: a parameter, or something computed of one."""
    tensor = torch.randn(draw(st.lists(SIZES, max_size=3)))
    kind = draw(st.sampled_from(["a parameter", "a view", "a buffer", "arange", "random", "a number"]))
    if kind == "a parameter":
        return call(kind, lambda w: w, w=tensor)
    if kind == "a view":
        return call(kind, lambda w: w.flatten()[1:] * 2, w=tensor)
    if kind == "a buffer":
        dtypes = [torch.float16, torch.int32, torch.bool, torch.float64]
        return call(kind, lambda w: w, w=tensor.to(draw(st.sampled_from(dtypes))))
    if kind == "a number":
        return call(kind, lambda: torch.tensor(1.5))
    return call("arange", lambda: torch.arange(4)) if kind == "arange" else call("random", lambda: torch.rand(4))
