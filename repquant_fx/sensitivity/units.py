"""Units: what can be given bits of its own by a recipe."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from repquant_fx.passes.base import module_path
from repquant_fx.passes.channel_flow import origin
from repquant_fx.passes.match_sites import Group, Plan, Site
from repquant_fx.recipe import Recipe
from repquant_fx.sensitivity.estimate import Estimate, Tally

WEIGHTS, ACTIVATIONS = "weights", "activations"


@dataclass(frozen=True, eq=False)  # itself a key
class Unit:
    """The weights of a module, or the activations that modules read from one place.

    Attributes:
        kind: `weights` or `activations`.
        paths: module paths that a recipe has to name.
        sites: names of the activations, empty for weights.
        bits: in the recipe that was analysed.
        pinned: that recipe sets the bits by a rule (or as `input_bits`), so a search leaves them.
        elements: weights, or activation values per sample.
        damage: by bits: what it does to the model's output (see `sensitivity.estimate`), alone.
        sqnr_db: by bits: SQNR of the activation, or of the layer's output if only its weight is quantized, dB.
    """

    kind: str
    paths: tuple[str, ...]
    sites: tuple[str, ...]
    bits: int
    pinned: bool
    elements: int
    damage: dict[int, float] = field(default_factory=dict)
    sqnr_db: dict[int, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(self.sites or self.paths)

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "kind": self.kind,
            "name": self.name,
            "paths": list(self.paths),
            "bits": self.bits,
            "pinned": self.pinned,
            "elements": self.elements,
            "damage": {str(b): v for b, v in self.damage.items()},
            "sqnr_db": {str(b): v for b, v in self.sqnr_db.items()},
        }


@dataclass
class Members:
    """A unit before it is measured: the nodes or sites in it."""

    kind: str
    paths: tuple[str, ...]
    bits: int
    pinned: bool
    consumers: list[Node] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)

    def measured(self, estimate: Estimate, elements: Mapping[str, int], samples: int) -> Unit:
        """With what was estimated for its members; errors of several members are taken as independent."""
        parts = [estimate.weights[c] for c in self.consumers] or [estimate.activations[s.name] for s in self.sites]
        # members of a pinned unit may differ in their bits, and have those alone
        totals = {
            bits: sum((part.get(bits) or next(iter(part.values())) for part in parts), Tally()) for bits in parts[0]
        }
        count = sum(_weights(c) for c in self.consumers) or round(
            sum(elements[s.name] for s in self.sites) / max(1, samples)
        )
        return Unit(self.kind, self.paths, tuple(s.name for s in self.sites), self.bits, self.pinned, count,
                    {b: t.damage for b, t in totals.items()}, {b: t.sqnr_db for b, t in totals.items()})


def members(plan: Plan, recipe: Recipe) -> list[Members]:
    """The units of a plan in graph order, weights of a layer after what it reads.

    Layers at one path share their bits, and so do all layers that read one activation, or are behind one norm.
    """
    units: dict[tuple[str, str], Members] = {}
    root: dict[str, str] = {}

    def find(path: str) -> str:
        while root.setdefault(path, path) != path:
            path = root[path]
        return path

    for group in plan.groups:
        paths = [path_of(c, group) for c in group.consumers]
        for path in paths:
            root[find(path)] = find(paths[0])
    for group in plan.groups:
        for site in group.sites:
            home = find(path_of(site.consumers[0], group))
            shared = tuple(sorted(p for p in root if find(p) == home))
            pinned = any(_ruled(recipe, p, "abits") for p in shared) or origin(site.value).op == "placeholder"
            unit = units.setdefault((ACTIVATIONS, home), Members(ACTIVATIONS, shared, site.bits, False))
            unit.sites.append(site)
            unit.pinned = unit.pinned or pinned
        for consumer in group.consumers if group.kind != "matmul" else ():
            path = path_of(consumer, group)
            units.setdefault(
                (WEIGHTS, path), Members(WEIGHTS, (path,), group.plans[consumer].wbits, _ruled(recipe, path, "wbits"))
            ).consumers.append(consumer)
    return list(units.values())


def path_of(consumer: Node, group: Group) -> str:
    """What a recipe's rules match for an operator, as `match sites` sees it."""
    return module_path(consumer) or ("" if group.kind != "matmul" else consumer.name)


def _ruled(recipe: Recipe, path: str, field_: str) -> bool:
    return any(getattr(rule, field_) is not None and fnmatch.fnmatchcase(path, rule.match) for rule in recipe.layers)


def _weights(consumer: Node) -> int:
    weight = consumer.args[1]
    assert isinstance(weight, Node) and isinstance(weight.meta["val"], Tensor)
    return int(weight.meta["val"].numel())
