"""Tiny models with redrawn weights, and short ways through the compiler's stages."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from repquant_fx.decision import Decision
from repquant_fx.frontends.capture import capture
from repquant_fx.parity import TIE, CodeRecorder
from repquant_fx.passes.base import Pass, attribute, run_pass, run_passes
from repquant_fx.passes.fuse_requantization import SLACK, Fused, FuseRequantization
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.passes.install_decision import InstallDecision, installed_weights
from repquant_fx.passes.match_sites import Group, MatchSites, Plan
from repquant_fx.passes.normal_form import PASSES
from repquant_fx.passes.operators import QUANTIZE
from repquant_fx.passes.slots import install
from repquant_fx.pipeline import Quantized, quantize_sequentially
from repquant_fx.pipeline.choose import choose_quantizers
from repquant_fx.quantizers.gptq import QuantizedWeight
from repquant_fx.quantizers.observers import Observer, Passthrough
from repquant_fx.recipe import Recipe

aten = torch.ops.aten

# switches of the quickest compile
FAST = [
    "--no-gptq",
    "--no-correction",
    "--clipping",
    "none",
    "--activations",
    "minmax",
    "--weights",
    "minmax",
    "--softmax-scale",
    "percentile",
    "--rotate",
    "none",
]


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, so that no output is near zero and no norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if name == "weight" and parameter.ndim >= 2:
                    parameter.copy_(noise / math.sqrt(parameter[0].numel()))
                elif name == "weight":
                    parameter.copy_(torch.exp(0.3 * noise))
                else:
                    parameter.copy_(0.3 * noise)
    return model.eval()


def plant(norm: nn.Module, linears: Sequence[nn.Linear], spread: float = 30.0, seed: int = 0) -> Tensor:
    """Give the norm's channels scales `spread` apart, undone in the columns of the Linears that read it."""
    width = linears[0].in_features
    powers = torch.rand(width, generator=torch.Generator().manual_seed(seed)) * math.log(spread)
    factors = torch.exp(powers - powers.mean())
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.mul_(factors)
        for linear in linears:
            linear.weight.div_(factors)
    return factors


def vit(depth: int = 2, seed: int = 0, **options: object) -> nn.Module:
    import timm

    settings: dict[str, object] = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "num_heads": 2,
        "num_classes": 5,
        "depth": depth,
    }
    return redraw(timm.create_model("vit_tiny_patch16_224", **{**settings, **options}), seed)


def swin(seed: int = 0) -> nn.Module:
    import timm

    return redraw(
        timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=16,
            patch_size=2,
            window_size=2,
            embed_dim=16,
            depths=(2, 1),
            num_heads=(1, 2),
            num_classes=5,
        ),
        seed,
    )


class Block(nn.Module):
    """Pre-norm transformer block with separate q, k, v; `style` picks the norm and biases."""

    def __init__(
        self, width: int = 16, heads: int = 2, *, norm: str = "layer", bias: bool = True, causal: bool = False
    ) -> None:
        super().__init__()
        make = {"layer": lambda: nn.LayerNorm(width), "rms": lambda: nn.RMSNorm(width, eps=1e-6),
                "plain": lambda: nn.LayerNorm(width, elementwise_affine=False),
                "rms_plain": lambda: nn.RMSNorm(width, elementwise_affine=False)}[norm]
        self.norm1, self.norm2 = make(), make()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.proj = nn.Linear(width, width, bias=bias)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width, bias=bias)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).reshape(b, t, self.heads, c // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(a.transpose(1, 2).reshape(b, t, c))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Function(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Encoder(nn.Module):
    """Blocks, final norm, mean over tokens, head; the input is a sequence of vectors."""

    def __init__(self, depth: int = 1, width: int = 16, tokens: int = 6, **options: object) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        self.embed = nn.Linear(8, width)
        self.blocks = nn.Sequential(*(Block(width, **options) for _ in range(depth)))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


class PostNorm(nn.Module):
    """The residual reads the norm's output, as in BERT."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.norm, self.fc1 = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 24)
        self.fc2, self.last = nn.Linear(24, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        return self.last(h + self.fc2(torch.relu(self.fc1(h))))


def images(count: int = 8, seed: int = 1, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def sequences(count: int = 32, tokens: int = 6, width: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(seed))


def canonical(model: nn.Module, *inputs: Tensor, until: type[Pass[Any]] | None = None) -> GraphModule:
    """The normal form, or the graph as a pass of the normal form finds it."""
    passes = itertools.takewhile(lambda each: each is not until, PASSES)
    return run_passes(capture(model, [t[:2] for t in inputs]).graph_module, [each() for each in passes])


def match(graph_module: GraphModule, recipe: Recipe | None = None) -> Plan:
    return run_pass(graph_module, MatchSites(recipe or Recipe()))


@dataclass
class Run:
    """A model before and after quantization."""

    reference: GraphModule
    graph_module: GraphModule
    plan: Plan
    result: Quantized

    @property
    def weights(self) -> dict[Node, QuantizedWeight]:
        """Before lowering."""
        return installed_weights(self.graph_module, self.plan)


def observed(graph_module: GraphModule, batches: Sequence[Tensor], recipe: Recipe | None = None) -> Plan:
    """Match, insert observers, and record all batches at every site at once (nothing is quantized)."""
    plan = match(graph_module, recipe)
    run_passes(graph_module, [InsertObservers(plan, len(batches))])
    for module in graph_module.modules():
        if isinstance(module, Observer):
            module.start(len(batches))
    with torch.no_grad():
        for batch in batches:
            graph_module(batch)
    for module in graph_module.modules():
        if isinstance(module, Observer):
            module.recording = False
    return plan


def calibrate(graph_module: GraphModule, recipe: Recipe, *groups: Group) -> None:
    """Put quantizers in place of the observers of some groups."""
    for group in groups:
        run_passes(graph_module, [InstallDecision(group, Decision(choose_quantizers(graph_module, group, recipe)))])


def quantized(graph_module: GraphModule, recipe: Recipe, batches: Sequence[Tensor]) -> Run:
    """Quantize a canonical graph; the graph given is left as it is."""
    reference, graph_module = graph_module, copy.deepcopy(graph_module)
    plan = match(graph_module, recipe)
    run_passes(graph_module, [InsertObservers(plan, len(batches))])
    return Run(
        reference, graph_module, plan, quantize_sequentially(graph_module, plan, [(b,) for b in batches], recipe)
    )


@torch.no_grad()
def values_at(graph_module: GraphModule, nodes: Sequence[Node], *inputs: Tensor) -> list[Tensor]:
    """What `nodes` give."""
    interpreter = Interpreter(graph_module, garbage_collect_values=False)
    interpreter.run(*inputs)
    return [interpreter.env[n] for n in nodes]


@torch.no_grad()
def output(graph_module: nn.Module, *inputs: Tensor) -> Tensor:
    result = graph_module(*inputs)
    return result[0] if isinstance(result, (tuple, list)) else result


def fused_as_promised(graph_module: GraphModule, fuse: FuseRequantization, *inputs: Tensor) -> Fused:
    """Fuse a lowered graph and hold the pass to its promise, on equal inputs at every quantizer."""
    names = list(fuse.quantizers)
    nodes = [fuse.quantizers[n] for n in names]
    codes = dict(zip(names, values_at(graph_module, nodes, *inputs)))
    uniform = {
        n: node
        for n, node in zip(names, nodes)
        if node.target is QUANTIZE and attribute(graph_module, node.args[1]).ndim == 0
    }
    sources = dict(zip(uniform, values_at(graph_module, [node.args[0] for node in uniform.values()], *inputs)))
    steps = {n: sources[n].double() / attribute(graph_module, node.args[1]).double() for n, node in uniform.items()}
    fused = run_pass(graph_module, fuse)
    recorder = CodeRecorder(graph_module, fused.quantizers, codes)
    recorder.run(*inputs)
    for name, step in steps.items():
        apart = (recorder.seen[name].int() - codes[name].int()).abs()
        assert int(apart.max()) <= 1, name
        from_midpoint = (step - step.floor() - 0.5).abs()
        assert not bool((apart.bool() & (from_midpoint > SLACK + TIE)).any()), name
    return fused


def bypass(graph_module: GraphModule, plan: Plan) -> None:
    """Take all quantizers out: what remains is the float computation of the rewritten graph."""
    for group in plan.groups:
        for site in group.sites:
            install(graph_module, site, Passthrough())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def norm_groups(plan: Plan) -> list[Group]:
    return [g for g in plan.groups if g.norm is not None]


def count(graph_module: GraphModule, *targets: object) -> int:
    return sum(n.op == "call_function" and n.target in targets for n in graph_module.graph.nodes)
