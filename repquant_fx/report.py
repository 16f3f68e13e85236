"""What was done to a model, layer by layer, as plain data for JSON and as text for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx import audit
from repquant_fx.audit import Product
from repquant_fx.named_runtime import RuntimeCheck
from repquant_fx.parity import Parity, signal_and_noise
from repquant_fx.passes.base import LeftAlone, module_path
from repquant_fx.passes.install_decision import installed_weights
from repquant_fx.passes.match_sites import Group, Plan, Site
from repquant_fx.passes.slots import slot_module
from repquant_fx.passes.store_caches import stored_as
from repquant_fx.pipeline import Quantized
from repquant_fx.pipeline.padding import find_padding
from repquant_fx.pipeline.routed import kept_rows
from repquant_fx.quantizers.observers import LogQuantizer, UniformQuantizer
from repquant_fx.quantizers.requantization import Codes
from repquant_fx.recipe_settings import FLOAT
from repquant_fx.recorder import Recorder
from repquant_fx.security.escape import printable
from repquant_fx.torch_private import pytree

SLICE = 4  # samples run at a time for the layers' SQNR


def describe_layers(
    graph_module: GraphModule, plan: Plan, quantized: Quantized, *, gptq: bool = True
) -> list[dict[str, Any]]:
    """One entry per quantized operator, in graph order; call before lowering, while the quantizers are in the graph.

    Args:
        gptq: whether the recipe asks for it.
    """
    entries, weights = [], installed_weights(graph_module, plan)
    for group in plan.groups:
        for consumer in group.consumers:
            sites = [s for s in group.sites if consumer in s.consumers]
            entry: dict[str, Any] = {
                "path": module_path(consumer) or consumer.name,
                "operator": str(consumer.target).split(".")[1],
                "node": consumer.name,
                "group": group.kind,
                "inputs": [describe_site(graph_module, s) for s in sites],
                "rewritten": _rewritten(group, quantized),
            }
            if consumer in weights:
                weight, plan_of = weights[consumer], group.plans[consumer]
                wanted = gptq and plan_of.gptq
                entry["weight"] = {
                    "bits": plan_of.wbits,
                    "granularity": f"per output channel and {weight.group} inputs" if weight.group
                                   else "per output channel",
                    "zero_point": 0 if weight.zero_point is None else "one for each scale",
                    "scale": {
                        "min": float(weight.scale.min()),
                        "max": float(weight.scale.max()),
                        "count": weight.scale.numel(),
                    },
                    "method": "GPTQ" if wanted and consumer in quantized.errors else "round to nearest",
                }
                if wanted and consumer not in quantized.errors:
                    why = f"GPTQ has no second moments of the input of a {entry['operator']} whose windows are not " \
                          "rows of one matrix"
                    if kept_rows(consumer) is not None:
                        why = "no token of the calibration data reached this expert; give more data, or other"
                    entry["notes"] = [f"rounded to nearest: {why}"]
                if consumer in quantized.errors:
                    nearest, chosen = quantized.errors[consumer]
                    entry["weight"]["output_error"] = {"round_to_nearest": nearest, "chosen": chosen}
            entries.append(entry)
    return entries


def describe_site(graph_module: GraphModule, site: Site) -> dict[str, Any]:
    """Bits, scale and zero point of one activation quantizer."""
    module = slot_module(graph_module, site)
    entry: dict[str, Any] = {"name": site.name, "bits": site.bits}
    if isinstance(module, LogQuantizer):
        kind = "log2" if module.steps == 1 else "logarithmic, as shifts"
        if module.normalized:
            kind += ", rows divided by their sum"
        return entry | {"quantizer": kind, "codes_per_octave": module.steps, "scale": float(module.scale),
                        "zero_code": (1 << site.bits) - 1}
    if isinstance(module, UniformQuantizer):
        if module.axis is None:
            return entry | {"quantizer": "uniform", "scale": float(module.scale), "zero_point": int(module.zero_point)}
        return entry | {"quantizer": "uniform per channel", "scale": module.scale.tolist(),
                        "zero_point": [int(z) for z in module.zero_point.tolist()]}
    return entry | {"quantizer": "none"}


def _rewritten(group: Group, quantized: Quantized) -> list[str]:
    notes = [*group.notes, *quantized.notes.get(group, ())]
    if group.kind == "matmul" and group.softmax is not None and any(s.role == "softmax" for s in group.sites):
        notes.append("softmax and its quantizer became one operator in the domain repquant_fx")
    return notes


def layer_sqnr(float_module: GraphModule, shipped: GraphModule, names: Sequence[str], inputs: Sequence[Tensor],
               codes: Mapping[str, Codes] | None = None) -> dict[str, float]:
    """SQNR in dB of each named node's output against the float model, everything before it quantized too.

    Args:
        codes: the Linears of `shipped` whose output is in codes.

    Returns:
        by name; a node that one of the graphs lacks is left out.
    """
    signal: dict[str, float] = dict.fromkeys(names, 0.0)
    noise: dict[str, float] = dict.fromkeys(names, 0.0)
    slices = list(_slices(float_module, inputs))
    padding = find_padding(float_module, slices)
    for number, batch in enumerate(slices):
        expected, computed = _values(float_module, names, batch), _values(shipped, names, stored_as(shipped, batch))
        both = expected.keys() & computed.keys()
        for name in both:
            value = computed[name]
            if codes is not None and name in codes:
                value = (value.double() - codes[name].offset) * codes[name].step
            more, lost = signal_and_noise(value, expected[name], padding.counts(number, name))
            signal[name] += more
            noise[name] += lost
    return {
        n: 10 * math.log10(signal[n] / noise[n]) if noise[n] > 0 and signal[n] > 0 else math.inf
        for n in names
        if n in both
    }


def counted_outputs(graph_module: GraphModule, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """What counts of each output of a graph."""
    padding = find_padding(graph_module, [tuple(inputs)])
    outputs = (n for n in pytree.tree_leaves(graph_module.graph.output_node().args[0]) if isinstance(n, Node))
    return [padding.counts(0, node.name) for node in outputs]


def _slices(graph_module: GraphModule, inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """A few samples at a time, where the graph takes any number of them in each input."""
    axes = [n.meta["val"].shape[:1] for n in graph_module.graph.find_nodes(op="placeholder")]
    count = len(inputs[0])
    fixed = any(not size or isinstance(size[0], int) for size in axes) or any(len(t) != count for t in inputs)
    step = count if fixed or count % SLICE else SLICE
    for start in range(0, count, step):
        yield tuple(t[start:start + step] for t in inputs)


def _values(graph_module: GraphModule, names: Sequence[str], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    recorder = Recorder(graph_module, [n for n in graph_module.graph.nodes if n.name in set(names)])
    with torch.no_grad():
        recorder.run(*inputs)
    return {node.name: value for node, value in recorder.kept.items() if isinstance(value, Tensor)}


def build(
    *,
    layers: list[dict[str, Any]],
    plan: Plan,
    quantized: Quantized,
    sqnr: Mapping[str, float],
    output_sqnr: float | None,
    parity: Parity | None,
    kernels: Sequence[Product] | None,
    about: Mapping[str, Any],
    named: RuntimeCheck | None = None,
    runtime_form: Sequence[LeftAlone] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole report as JSON data. Infinite values are written as null.

    Args:
        named: the check in the runtime of the target, where that is not ONNX Runtime.
        runtime_form: what lowering and the runtime form left as it was.
        notes: what was done otherwise than asked for, about the whole compile.
    """
    for entry in layers:
        entry["sqnr_db"] = sqnr.get(entry["node"])
        if entry["node"] not in sqnr:
            entry["notes"] = [*entry.get("notes", []), "no SQNR: the exported graph has no such value"]
    return finite({
        **about,
        "output_sqnr_db": output_sqnr,
        "parity": parity.to_dict() if parity is not None else None,
        "runtime": named.to_dict() if named is not None else None,
        "kernels": [asdict(product) for product in kernels] if kernels is not None else None,
        "layers": layers,
        "left_alone": [asdict(item) for item in plan.left_alone],
        "runtime_form": [asdict(item) for item in runtime_form],
        "notes": list(notes),
        "segments": quantized.segments,
        "node_executions": quantized.node_executions,
    })


def checked(parity: Mapping[str, Any]) -> str:
    """What the check in a runtime judges, in words: each step on equal inputs.

    Args:
        parity: see `parity.Parity.to_dict`.
    """
    quantizers = parity["quantizers"].values()
    worst = max((q["share_step"] for q in quantizers), default=0.0)
    if not quantizers:
        apart = parity["output_step"]
        return f"checked in {parity['runtime']}: outputs are at most {apart:.2g} of the largest value apart"
    differ = f"at most {100 * worst:.2g} % of the codes differ" if worst else "0 codes differ"
    if not worst and any(q["largest_step"] for q in quantizers):
        differ += " but for values midway between two codes"
    return f"checked in {parity['runtime']} at each of {len(quantizers)} quantizers on equal inputs: {differ}"


def free_running(parity: Mapping[str, Any]) -> str:
    """What is not judged: a code on a rounding boundary flips, and those that follow from it flip too."""
    return (f"free running, where one code at a tie turns others behind it: output {_decibels(parity['output_sqnr'])}, "
            f"{100 * parity['mean_share']:.4f} % of the codes differ from those of {parity['reference']}")


def summary(report: Mapping[str, Any], *, verbose: bool = False) -> str:
    """A few lines for the terminal, a few more where `verbose`; names from the model are escaped."""
    layers = report["layers"]
    weights = [e for e in layers if "weight" in e]
    norms = {e["path"] for e in layers if e["group"] == "norm_linear"}
    logs = sum(any("log" in i.get("quantizer", "") for i in e["inputs"]) for e in layers)
    lines = [f"quantized {len(weights)} weighted layers and {len(layers) - len(weights)} products "
             f"({report['bits']}); {len(norms)} layers behind norms, {logs} softmax operands on a logarithmic grid"
             if any(i["bits"] != FLOAT for entry in layers for i in entry["inputs"])
             else f"quantized the weights alone of {len(weights)} layers ({report['bits']})"]
    for item in report["left_alone"]:
        lines.append(f"left alone: {item['operator']} at {item['path']}: {item['reason']}")
    if report.get("output_sqnr_db") is not None:
        lines.append(
            f"output SQNR against float: {report['output_sqnr_db']:.2f} dB on {report['calibration']['held_back']} "
            "held-back samples"
        )
    lines += report.get("notes", [])
    for entry in layers:
        lines += [f"{entry['path']}: {note}" for note in entry.get("notes", [])]
    if report.get("runtime_form"):
        lines.append(f"{len(report['runtime_form'])} operators keep a slower form; the report says which and why")
    parity = report.get("parity")
    if parity:
        lines += [checked(parity), *([free_running(parity)] if verbose else [])]
    if report.get("runtime"):
        lines += _named_runtime(report["runtime"], report.get("output_sqnr_db"))
    if report.get("kernels") is not None and not (report.get("runtime") or {}).get("kernels"):
        lines.append(audit.summary(Product(**product) for product in report["kernels"]))
    return "\n".join(map(printable, lines))


def _named_runtime(named: Mapping[str, Any], quantization: float | None) -> list[str]:
    """What the runtime of the target computed, or why nobody knows."""
    if named["parity"] is None:
        return [f"not checked in {named['runtime']}, the runtime of the target: {named['skipped']}; ONNX Runtime was"]
    lines = [checked(named["parity"]), free_running(named["parity"])]
    if named.get("kernels"):
        lines.append(audit.summary((Product(**product) for product in named["kernels"]), "openvino"))
    if named["precision"]:
        found, more = named["output_sqnr"], ""
        if found is not None and quantization is not None and found < quantization:
            more = ", which is worse than what quantization costs"
        lines.append(f"unasked, {named['runtime']} computes float operators in {named['precision']} on this processor: "
                     f"output {_decibels(found)}{more}; INFERENCE_PRECISION_HINT=f32 keeps float32")
    return lines


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"


def finite(value: Any) -> Any:
    """JSON data without infinities: they are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
