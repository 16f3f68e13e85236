"""Blocks as transformers have them, of a few channels: attention, windows, patches, gates, modules of torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Draw = Callable[[st.SearchStrategy[Any]], Any]
MASKS = ["none", "none", "causal", "added", "low", "closed", "sdpa", "fitting"]
ACTIVATIONS = [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.Tanh(), nn.LeakyReLU()]


class Attention(nn.Module):
    """Over axis 1 of (batch, tokens, channels): `heads` heads of 2 channels; one Linear for all operands, or three."""

    def __init__(
        self, width: int, heads: int, mask: str, *, fused: bool, rotary: bool, shared: bool, bias: bool
    ) -> None:
        super().__init__()
        self.heads, self.mask, self.fused, self.rotary, self.shared = heads, mask, fused, rotary, shared
        kept = 1 if shared else heads  # heads of keys and values
        if fused:
            self.qkv = nn.Linear(width, 2 * (heads + 2 * kept), bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, 2 * n, bias=bias) for n in (heads, kept, kept))
        self.sizes = [2 * heads, 2 * kept, 2 * kept]
        self.out = nn.Linear(2 * heads, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        parts = self.qkv(x).split(self.sizes, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(b, t, -1, 2).transpose(1, 2) for part in parts)
        if self.rotary:
            angle = torch.arange(t, device=x.device).to(x.dtype)[:, None]
            q, k = (y * angle.cos() + torch.cat([-y[..., 1:], y[..., :1]], -1) * angle.sin() for y in (q, k))
        if self.shared:
            k, v = (y.repeat_interleave(self.heads, 1) for y in (k, v))
        if self.mask == "sdpa":
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        scores = self.masked(q @ k.transpose(-2, -1) * 2**-0.5, x)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))

    def masked(self, scores: Tensor, x: Tensor) -> Tensor:
        t = x.shape[1]
        later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        if self.mask == "causal":
            return scores.masked_fill(later, float("-inf"))
        if self.mask == "added":
            return scores + torch.where(later, torch.finfo(scores.dtype).min, 0.0)
        if self.mask == "low":
            return torch.where(later, torch.tensor(-1e4, dtype=scores.dtype), scores)
        if self.mask == "closed":  # from the data; a row may be closed altogether
            return scores.masked_fill((x[..., 0] > 0)[:, None, None], torch.finfo(scores.dtype).min)
        if self.mask == "fitting":
            return scores.masked_fill((x[..., 0] > 0)[:, None, None], float("-inf")).clamp(min=-1e30)
        return scores


class Windows(nn.Module):
    """Attention in windows of 2x2 of (batch, height, width, channels), shifted by one: Swin."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.shift, self.norm = shift, nn.LayerNorm(width)
        self.attention = Attention(width, 2, "none", fused=True, rotary=False, shared=False, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = F.pad(self.norm(x), (0, 0, 0, w % 2, 0, h % 2))
        y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        rows, columns = y.shape[1] // 2, y.shape[2] // 2
        tokens = y.view(b, rows, 2, columns, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.attention(tokens).view(b, rows, columns, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        y = torch.roll(y.reshape(b, 2 * rows, 2 * columns, c), (self.shift, self.shift), (1, 2))
        return x + y[:, :h, :w]


class Patches(nn.Module):
    """Patches of (batch, channels, height, width) as tokens, behind a token of their own, with positions."""

    def __init__(self, channels: int, size: int, width: int, tokens: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, size, size)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), tokens], 1) + self.positions


class Gated(nn.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, width: int, act: nn.Module, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 4, bias=bias), nn.Linear(width, 4, bias=bias)
        self.act, self.down = act, nn.Linear(4, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Several(nn.Module):
    """A norm that several Linears read, and with `more` something else too."""

    def __init__(self, norm: nn.Module, width: int, more: bool) -> None:
        super().__init__()
        self.norm, self.more = norm, more
        self.one, self.two = nn.Linear(width, 4), nn.Linear(width, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        both = self.one(y) * self.two(y)
        return torch.cat([both, y], -1) if self.more else both


class Residual(nn.Module):
    """`x + scale * inner(norm(x))`, or with `after` the norm of the sum."""

    def __init__(self, norm: nn.Module, inner: nn.Module, width: int, after: bool) -> None:
        super().__init__()
        self.norm, self.inner, self.after = norm, inner, after
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.inner(x)) if self.after else x + self.scale * self.inner(self.norm(x))


class Given(nn.Module):
    """A module of torch that takes x several times; of several results the first."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(*[x] * self.times)
        return found if isinstance(found, Tensor) else found[0]


def block(draw: Draw, x: Tensor) -> nn.Module:
    """A block that reads `x`; of other shapes than it needs, torch refuses it."""
    width = x.shape[-1] if x.ndim else 1
    flat = ["several", "gated", "residual", "weight norm", "bilinear"]
    sequence = ["attention"] * 5 + ["residual attention"] * 2 + ["encoder", "multihead", "gru"]
    images = ["windows", "windows", "patches", "patches", "separable"]
    kinds = {3: [*flat, *sequence], 4: [*flat, *images]}.get(x.ndim, flat)
    kind, bias = draw(st.sampled_from(kinds)), draw(st.booleans())
    act, norm = draw(st.sampled_from(ACTIVATIONS)), draw(st.sampled_from([nn.LayerNorm(width), nn.RMSNorm(width)]))
    if kind == "several":
        return Several(norm, width, bias)
    if kind == "gated":
        return Gated(width, act, bias)
    if kind == "residual":
        return Residual(norm, Gated(width, act, bias), width, draw(st.booleans()))
    if kind == "weight norm":
        return nn.utils.parametrizations.weight_norm(nn.Linear(width, 4, bias=bias))
    if kind == "bilinear":
        return Given(nn.Bilinear(width, width, 4, bias=bias), 2)
    if kind == "windows":
        return Windows(width, draw(st.integers(0, 1)))
    if kind == "patches":
        size = draw(st.integers(1, 2))
        return Patches(x.shape[1], size, 4, (x.shape[2] // size) * (x.shape[3] // size))
    if kind == "separable":
        channels = x.shape[1]
        deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        return nn.Sequential(deep, nn.BatchNorm2d(channels), act, nn.Conv2d(channels, 4, 1, bias=bias))
    if kind == "encoder":
        return nn.TransformerEncoderLayer(width, draw(st.integers(1, 2)), 4, batch_first=True, norm_first=bias)
    if kind == "multihead":
        return Given(nn.MultiheadAttention(width, draw(st.integers(1, 2)), bias=bias, batch_first=True), 3)
    if kind == "gru":
        return Given(nn.GRU(width, 4, batch_first=True, bias=bias), 1)
    attention = Attention(width, draw(st.integers(1, 2)), draw(st.sampled_from(MASKS)), fused=draw(st.booleans()),
                          rotary=draw(st.booleans()), shared=draw(st.booleans()), bias=bias)
    return Residual(norm, attention, width, draw(st.booleans())) if kind == "residual attention" else attention
