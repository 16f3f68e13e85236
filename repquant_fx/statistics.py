"""What the HTML report draws, summarised while the data are at hand: no raw sample is kept.

Collected only when asked for, at the moment a group is calibrated, from the samples that calibrated it. An activation
with channels gives quantiles and a histogram per channel for at most `CHANNELS` channels, any other a histogram, and
a weight the errors of its rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from repquant_fx.quantizers.gptq import output_error
from repquant_fx.quantizers.logarithmic import level_table
from repquant_fx.quantizers.observers import LogQuantizer, Observer, UniformQuantizer
from repquant_fx.quantizers.reparameterization import ChannelAffine, reparameterize
from repquant_fx.quantizers.uniform import levels

if TYPE_CHECKING:
    from repquant_fx.passes.match_sites import Site

CHANNELS = 64  # channels kept of an activation, and output channels of a weight
CHANNEL_BINS, TENSOR_BINS = 40, 96
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
OCTAVES_BELOW = 4  # how far below the smallest level a histogram of logarithms reaches
KEY = "statistics"  # in a work directory


@dataclass
class Statistics:
    """Summaries as JSON data, floats of five digits, None where one is not finite.

    Attributes:
        activations: by site name; see `channels`, `probabilities` and `values`. A site that was calibrated together
            with an earlier one holds {"same_as": its name}.
        weights: by the name of the consumer node; see `rounding`.
    """

    activations: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)

    def observe(self, sites: Sequence[Site], observers: Mapping[str, Observer], quantizers: Mapping[str, nn.Module], *,
                reparameterized: bool) -> None:
        """Summarise what calibrated the sites of one group.

        Args:
            observers, quantizers: by site name; sites without an observer are left out.
            reparameterized: whether per-channel quantizers become one per tensor afterwards.
        """
        sites = [site for site in sites if site.name in observers]
        norms = [site for site in sites if site.role == "norm"]
        if norms:
            quantizer = quantizers[norms[0].name]
            assert isinstance(quantizer, UniformQuantizer)
            affine = (
                reparameterize(*quantizer.exact, quantizer.bits)
                if reparameterized and quantizer.axis is not None
                else None
            )
            sample = torch.cat([observers[site.name].sample() for site in norms], dim=1)
            self.activations[norms[0].name] = channels(sample, quantizer, affine)
            self.activations.update({site.name: {"same_as": norms[0].name} for site in norms[1:]})
        for site in (site for site in sites if site.role != "norm"):
            sample, chosen = observers[site.name].sample(), quantizers[site.name]
            if isinstance(chosen, LogQuantizer):
                self.activations[site.name] = probabilities(sample, chosen)
            elif isinstance(chosen, UniformQuantizer):
                self.activations[site.name] = values(sample, chosen)

    def add(self, other: Statistics) -> None:
        """Take in those of another group."""
        self.activations |= other.activations
        self.weights |= other.weights

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `repquant_fx.html.page`."""
        return {"activations": self.activations, "weights": self.weights}

    def to_tensors(self) -> dict[str, Tensor]:
        """For a work directory: the JSON text as bytes."""
        return {KEY: torch.tensor(list(json.dumps(self.to_dict()).encode()), dtype=torch.uint8)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics | None:
        """The inverse; None where the work directory was filled without statistics."""
        return cls(**json.loads(tensors[KEY].cpu().numpy().tobytes())) if KEY in tensors else None


def channels(sample: Tensor, quantizer: UniformQuantizer, affine: ChannelAffine | None) -> dict[str, Any]:
    """An activation behind a norm: boxplots before and after reparameterization, and clipping bounds over histograms.

    Args:
        sample: shape (D, N), as observed.
        quantizer: as calibrated, per channel or per tensor.
        affine: the reparameterization that follows, None where there is none.

    Returns:
        `total` channels, the `channels` kept, and `before`: quantiles (0, 25, 50, 75, 100 %), clipping bounds `low` and
        `up` and a histogram of each kept channel; `span`, the ratio of the widest channel's range to the narrowest's.
        `after` the same without histograms, its `low` and `up` being those of the one scale; None without `affine`.
    """
    shown = spread_over((sample.amax(dim=1) - sample.amin(dim=1)).cpu().numpy())
    low, up = (bound.expand(len(sample)) for bound in bounds(quantizer))
    values = sample[shown].double().cpu().numpy()
    result: dict[str, Any] = {
        "kind": "channels",
        "bits": quantizer.bits,
        "total": len(sample),
        "channels": shown,
        "after": None,
        "before": {
            "quantiles": _short(np.quantile(values, QUANTILES, axis=1).T),
            "span": _span(sample),
            "low": _short(low[shown]),
            "up": _short(up[shown]),
        },
        "histograms": [histogram(row, CHANNEL_BINS) for row in values],
    }
    if affine is not None:
        mapped = affine.apply(sample.T.double()).T
        quantiles = np.quantile(mapped[shown].cpu().numpy(), QUANTILES, axis=1).T
        low, up = bounds(UniformQuantizer(affine.scale, affine.zero_point, quantizer.bits))
        result["after"] = {"quantiles": _short(quantiles), "span": _span(mapped), "low": _short(low), "up": _short(up)}
    return result


def probabilities(sample: Tensor, quantizer: LogQuantizer) -> dict[str, Any]:
    """A Softmax activation: histograms of the values and of their base-2 logarithms, the share of exact `zeros` and of
    values `below` the second histogram, and the quantizer's positive `levels`, largest first.

    Args:
        sample: any shape, non-negative.
    """
    values = sample.double().flatten().cpu().numpy()
    table = level_table(float(quantizer.scale), quantizer.bits, quantizer.steps)[:-1].double().numpy()
    logarithms = np.log2(values[values > 0])
    floor = np.log2(table[-1]) - OCTAVES_BELOW
    inside = logarithms[logarithms >= floor]
    return {
        "kind": "probabilities",
        "bits": quantizer.bits,
        "steps": quantizer.steps,
        "levels": _short(table),
        "values": histogram(values, TENSOR_BINS, low=0.0),
        "logarithms": histogram(inside, TENSOR_BINS) if len(inside) else None,
        "zeros": _short((values == 0).mean()),
        "below": _short((len(logarithms) - len(inside)) / len(values)),
    }


def values(sample: Tensor, quantizer: UniformQuantizer) -> dict[str, Any]:
    """Any other activation: a histogram of the whole tensor, and the bounds `low` and `up` beyond which values are
    clipped.
    """
    low, up = bounds(quantizer)
    return {"kind": "values", "bits": quantizer.bits, "low": _short(low), "up": _short(up),
            "histogram": histogram(sample.double().flatten().cpu().numpy(), TENSOR_BINS)}


def rounding(weight: Tensor, lost: Tensor, errors: Tensor | None, hessian: Tensor | None, gptq: bool) -> dict[str, Any]:
    """Errors of a weight rounded to nearest and of the codes chosen, relative to what they approximate (squared norms).

    Args:
        weight: shape (out, in), as it was when rounded.
        lost: each row's ||w^ - w||^2 to nearest and as chosen, shape (out, 2).
        errors: the same of the layer's output on the calibration data, None where there is no Hessian.
        hessian: `2 X^T X` of the inputs (centred where a bias correction follows).

    Returns:
        For `nearest` and `chosen`: `weight`, ||W^ - W||^2 / ||W||^2; `output`, the same of the layer's output on the
            calibration data, and
        `channels`, the same of at most `CHANNELS` output channels by increasing error of the former. The last two None
        without a Hessian.
    """
    result: dict[str, Any] = {"method": "GPTQ" if gptq else "round to nearest", "total": len(weight)}
    whole = weight.double().square().sum()
    energy = None if hessian is None or errors is None else output_error(weight, weight.new_zeros(()), hessian)
    order: list[int] = []
    for column, name in enumerate(("nearest", "chosen")):
        result[name] = {"weight": _ratio(lost[:, column].sum(), whole), "output": None, "channels": None}
        if energy is not None and errors is not None:
            share = (errors[:, column] / energy.clamp(min=torch.finfo(energy.dtype).tiny)).cpu().numpy()
            order = order or np.argsort(share, kind="stable")[spread_over(share, by_rank=True)].tolist()
            result[name] |= {"output": _ratio(errors[:, column].sum(), energy.sum()), "channels": _short(share[order])}
    return result


def bounds(quantizer: UniformQuantizer) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value that a quantizer can represent, float64, scalar or (D,)."""
    scale, zero_point = quantizer.exact
    return -zero_point * scale, (levels(quantizer.bits) - 1 - zero_point) * scale


def histogram(values: np.ndarray, bins: int, *, low: float | None = None) -> dict[str, Any]:
    """`counts` of equal bins from `low` (the smallest value where None) to `high`, the largest. A constant gets a bin
    of its own width.
    """
    start, stop = float(values.min()) if low is None else low, float(values.max())
    if not stop - start > 1e-6 * max(abs(start), abs(stop), 1e-30):
        bins, stop = 1, start + max(abs(start) * 1e-3, 1e-9)
    counts, _ = np.histogram(values.clip(start, stop), bins=bins, range=(start, stop))
    return {"low": _short(start), "high": _short(stop), "counts": counts.tolist()}


def spread_over(measure: np.ndarray, *, by_rank: bool = False) -> list[int]:
    """At most `CHANNELS` indices, evenly over the ranks of `measure` with the smallest and the largest, in order; or
    the ranks themselves.
    """
    ranks = np.unique(np.linspace(0, len(measure) - 1, min(CHANNELS, len(measure))).round().astype(int))
    chosen = ranks if by_rank else np.sort(np.argsort(measure, kind="stable")[ranks])
    return [int(i) for i in chosen]


def _span(sample: Tensor) -> float | None:
    """The widest channel's range over the narrowest's; constant channels left out."""
    width = sample.amax(dim=1) - sample.amin(dim=1)
    width = width[width > 0]
    return _short(width.max() / width.min()) if len(width) else None


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return _short(part / whole) if float(whole) > 0 else None


def _short(value: Any) -> Any:
    """Five significant digits, as floats or nested lists of floats; None for what is not finite."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{float(value):.5g}") if math.isfinite(value) else None
