"""How much each layer suffers from few bits, in one run over the data with gradients and none for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from repquant_fx.errors import InputError
from repquant_fx.frontends.memory import left_as_found
from repquant_fx.options import from_keywords
from repquant_fx.passes.base import run_passes
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.pipeline import equalize_layers
from repquant_fx.pipeline.padding import find_padding
from repquant_fx.preparation import HELD_BACK, Prepared, check_runs, prepare
from repquant_fx.progress import progress
from repquant_fx.recipe import Recipe
from repquant_fx.recipe_settings import FLOAT
from repquant_fx.security.escape import printable
from repquant_fx.sensitivity.candidates import RoundedWeight, activation_quantizers, observe, rounded_weights
from repquant_fx.sensitivity.estimate import LOSSES, estimate
from repquant_fx.sensitivity.units import ACTIVATIONS, WEIGHTS, Unit, members

PROBES = 4


@dataclass(frozen=True)
class Sensitivity:
    """The result of `sensitivity`.

    Attributes:
        units: in graph order.
        loss: what `Unit.damage` measures: `error`, noise over signal power of the output, or `kl`, nats per prediction.
        samples: calibration samples used.
        probes: random directions at the output, each a backward pass.
        recipe: analysed.
    """

    units: tuple[Unit, ...]
    loss: str
    samples: int
    probes: int
    recipe: Recipe

    def ranking(self, kind: str | None = None) -> list[Unit]:
        """Units by damage at the recipe's bits, worst first."""
        return sorted((u for u in self.units if kind in (None, u.kind)), key=lambda u: -u.damage.get(u.bits, 0.0))

    def damage(self, unit: Unit, bits: int | None = None) -> str:
        """Of a unit, for people: an SQNR in dB or nats."""
        value = unit.damage[unit.bits if bits is None else bits]
        if self.loss == "kl":
            return f"{value:.2e}"
        return f"{-10 * math.log10(value):.1f}" if value > 0 else "inf"

    def to_dict(self) -> dict[str, Any]:
        """JSON data, worst unit first."""
        return {
            "loss": self.loss,
            "unit": "nats per prediction" if self.loss == "kl" else "noise power over signal power of the output",
            "samples": self.samples,
            "probes": self.probes,
            "recipe": self.recipe.to_dict(),
            "ranking": [{"rank": i, **_finite(u.to_dict())} for i, u in enumerate(self.ranking(), 1)],
        }

    def table(self, limit: int | None = None) -> str:
        """The ranking as text."""
        ranked = self.ranking()
        total = sum(u.damage.get(u.bits, 0.0) for u in ranked) or 1.0
        what = "KL, nats" if self.loss == "kl" else "output dB"
        others = sorted({b for u in ranked for b in u.damage}) if any(len(u.damage) > 1 for u in ranked) else []
        rows = [["rank", "kind", "bits", "share %", what, "own dB", *(f"at {b}" for b in others), "name"]]
        for index, unit in enumerate(ranked[:limit], 1):
            rows.append(
                [
                    str(index),
                    unit.kind,
                    str(unit.bits),
                    f"{100 * unit.damage[unit.bits] / total:.1f}",
                    self.damage(unit),
                    f"{unit.sqnr_db[unit.bits]:.1f}",
                    *(self.damage(unit, b) if b in unit.damage else "" for b in others),
                    printable(unit.name),
                ]
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = [
            "  ".join(
                [*(cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))), row[-1]]
            )
            for row in rows
        ]
        if limit is not None and len(ranked) > limit:
            lines.append(f"... and {len(ranked) - limit} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


@left_as_found
def sensitivity(
    model: Any, calibration: Any = None, recipe: Recipe | None = None, *, weight_choices: Iterable[int] | None = None,
    activation_choices: Iterable[int] | None = None, loss: str = "error", probes: int = PROBES, **keywords: Any,
) -> Sensitivity:
    """Rank weights and activations by what their bits do to the model's output, each quantized alone.

    The cost is one run of the float model, `probes` backward passes, and the rounding of each weight once for each
    choice of bits; it does not multiply with the number of layers. See `sensitivity.estimate` for the mathematics.

    Args:
        model, calibration, keywords: as `compile` takes them: samples, batch_size, seed, arch and so on, all that say
            what is loaded and what it is run on.
        recipe: method and bits; those that a rule of it sets are measured and not varied.
        weight_choices, activation_choices: further bits to measure, beside the recipe's.
        loss: `error` or `kl`; the latter where the outputs are logits.
        probes: more make the estimates less noisy.

    Raises:
        InputError: model, data or options cannot be used.
    """
    source, data = from_keywords(model, calibration, keywords)
    return analyse(prepare(source, data, recipe), Recipe.of(recipe), weight_choices=weight_choices,
                   activation_choices=activation_choices, loss=loss, probes=probes, seed=data.seed)


def analyse(
    prepared: Prepared, recipe: Recipe, *, weight_choices: Iterable[int] | None = None,
    activation_choices: Iterable[int] | None = None, loss: str = "error", probes: int = PROBES, seed: int = 0,
) -> Sensitivity:
    """`sensitivity` of a prepared model, whose graph is used up."""
    if loss not in LOSSES:
        raise InputError(f"the loss is one of {', '.join(LOSSES)}; found {loss!r}")
    if any(site.bits == FLOAT for group in prepared.plan.groups for site in group.sites):
        raise InputError("what bits do is measured where activations are quantized: give bits for abits, here and in "
                         "the recipe's rules")
    if probes < 1:
        raise InputError(f"at least 1 probe is needed, not {probes}")
    tried = {WEIGHTS: _checked(weight_choices), ACTIVATIONS: _checked(activation_choices)}
    graph_module, plan = prepared.graph_module, prepared.plan
    batches = list(prepared.data.split_held_back(HELD_BACK)[0].batches)
    check_runs(graph_module, batches)
    padding = find_padding(graph_module, batches)
    plan = equalize_layers(graph_module, plan, batches, recipe, padding=padding)
    run_passes(graph_module, [InsertObservers(plan, len(batches))])
    names = prepared.captured.input_names
    mask_index = names.index("attention_mask") if "attention_mask" in names else None
    observed = observe(graph_module, plan, batches, mask_index, padding)
    units = members(plan, prepared.recipe)
    site_choices, weight_bits = {}, {}
    for unit in units:
        for site in unit.sites:
            site_choices[site.name] = [site.bits] if unit.pinned else sorted({unit.bits, *tried[ACTIVATIONS]})
        for consumer in unit.consumers:
            weight_bits[consumer] = [unit.bits] if unit.pinned else sorted({unit.bits, *tried[WEIGHTS]})
    quantizers: dict[str, Any] = {}
    weights: dict[Any, dict[int, RoundedWeight]] = {}
    for group in progress(plan.groups, total=len(plan.groups), description="round"):
        quantizers.update(activation_quantizers(graph_module, group, site_choices, prepared.recipe))
        for site in group.sites if group.kind != "matmul" else ():
            weights.update(rounded_weights(graph_module, group, site, quantizers[site.name][site.bits], weight_bits,
                                           observed.moments.get(site.name), prepared.recipe))
    estimated = estimate(
        graph_module,
        plan,
        batches,
        quantizers,
        weights,
        observed,
        loss=loss,
        probes=probes,
        seed=seed,
        mask_index=mask_index,
        padding=padding,
    )
    measured = tuple(u.measured(estimated, observed.elements, observed.samples) for u in units)
    return Sensitivity(measured, loss, observed.samples, probes, recipe)


def _checked(choices: Iterable[int] | None) -> set[int]:
    bits = set(choices or ())
    if any(isinstance(b, bool) or not isinstance(b, int) or not 2 <= b <= 8 for b in bits):
        raise InputError(f"bits are integers from 2 to 8; found {sorted(map(str, bits))}")
    return bits


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return value
