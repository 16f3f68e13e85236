"""Forms: what a recipe can say otherwise of a group of sites, at the same bits, that changes how fast it runs.

| form | what it is about |
|---|---|
| `softmax uniform`, or `log` where the recipe says uniform | the grid of probabilities, so attention's second product |
| `symmetric on`, or `off` | the zero points of all activations |
| both, the preset `fast` | which some kernels need together |
| `activation_affine off`, `normalize_rows off` | operators that are added below 8 bits |
| `float LAYERS` | the layers, or products of attention, stay in float |
| `weights alone LAYERS` | their activations stay in float |

LAYERS are those of one role in all blocks: module paths that differ in numbers alone, and those that read the same
activation. Layers whose bits a rule of the recipe sets are left as they are.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from repquant_fx.passes.match_sites import Group, Plan
from repquant_fx.recipe import MANY_BITS, LayerRule, Recipe, literal
from repquant_fx.recipe_settings import FLOAT
from repquant_fx.sensitivity.units import path_of

LINEARS = ("norm_linear", "affine_linear", "linear")
SOFTMAX, GRIDS = "softmax", "symmetric"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a module path


@dataclass(frozen=True)
class Form:
    """A change of a recipe.

    Attributes:
        name: for people.
        about: what it decides; of forms that decide the same thing one can be taken.
        settings: of the recipe, with their values.
        rules: that follow those of the recipe.
    """

    name: str
    about: frozenset[str]
    settings: tuple[tuple[str, Any], ...] = ()
    rules: tuple[LayerRule, ...] = ()


@dataclass(frozen=True)
class Family:
    """Layers of one role.

    Attributes:
        name: their module paths with `*` for numbers.
        globs: what rules match them by, and no other layer of the model.
        linear: all of them are Linears.
        softmax: a product that reads a Softmax is among them.
        pinned: a rule of the recipe sets their bits.
    """

    name: str
    globs: tuple[str, ...]
    linear: bool
    softmax: bool
    pinned: bool


def apply(recipe: Recipe, forms: Iterable[Form]) -> Recipe:
    """The recipe with some forms, which decide different things."""
    forms = list(forms)
    settings = {name: value for form in forms for name, value in form.settings}
    return replace(recipe, **settings, layers=(*recipe.layers, *(rule for form in forms for rule in form.rules)))


def candidates(plan: Plan, recipe: Recipe) -> list[Form]:
    """All forms that differ from a recipe as it was matched, settings first, then layers in graph order."""
    found = [*_grids(plan, recipe), *_operators(plan, recipe)]
    every = families(plan, recipe)
    for family in every if len(every) > 1 else ():  # of a model in float nothing is left to compile
        found += _of_layers(family, recipe)
    return found


def _grids(plan: Plan, recipe: Recipe) -> list[Form]:
    found = []
    if any(site.bits != FLOAT for group in plan.groups if group.softmax is not None for site in group.sites):
        grid = "log" if recipe.softmax == "uniform" else "uniform"
        found.append(Form(f"softmax {grid}", frozenset({SOFTMAX}), (("softmax", grid),)))
    if any(site.bits != FLOAT for group in plan.groups for site in group.sites):
        word = "off" if recipe.symmetric else "on"
        found.append(Form(f"symmetric {word}", frozenset({GRIDS}), (("symmetric", not recipe.symmetric),)))
    if len(found) == 2:
        found.append(Form(", ".join(form.name for form in found), frozenset({SOFTMAX, GRIDS}),
                          tuple(setting for form in found for setting in form.settings)))
    return found


def _operators(plan: Plan, recipe: Recipe) -> list[Form]:
    found = []
    if any(group.kind == "affine_linear" for group in plan.groups):
        found.append("activation_affine")
    probabilities = [site for group in plan.groups if group.softmax is not None for site in group.sites]
    if recipe.normalize_rows and any(site.bits < MANY_BITS for site in probabilities):
        found.append("normalize_rows")
    return [Form(f"{name} off", frozenset({name}), ((name, False),)) for name in found]


def _of_layers(family: Family, recipe: Recipe) -> list[Form]:
    if family.pinned:
        return []
    about = frozenset({family.name, *([SOFTMAX] if family.softmax else [])})
    ways: dict[str, dict[str, Any]] = {"float": {"skip": True}}
    if family.linear and not recipe.weight_only and not recipe.reconstruct:
        ways["weights alone"] = {"abits": FLOAT}
    return [Form(f"{way} {family.name}", about, rules=tuple(LayerRule(glob, **changes) for glob in family.globs))
            for way, changes in ways.items()]


def families(plan: Plan, recipe: Recipe) -> list[Family]:
    """The quantized layers by their roles, in graph order; those without a module path are in none."""
    members: dict[str, list[tuple[str, Group]]] = {}  # by pattern: module paths, each with its group
    together: list[set[str]] = []
    for group in plan.groups:
        paths = [path for path in (path_of(consumer, group) for consumer in group.consumers) if path]
        for path in paths:
            members.setdefault(_pattern(path), []).append((path, group))
        together.append({_pattern(path) for path in paths})
    every = {path for found in members.values() for path, _ in found}
    return [_family(sorted(patterns, key=list(members).index), members, every, recipe)
            for patterns in merged(together)]


def merged(sets: Iterable[set[str]]) -> list[set[str]]:
    """Sets that share an element as one, in the order of the first of each; empty ones are left out."""
    found: list[set[str]] = []
    for each in filter(None, sets):
        touching = [other for other in found if other & each]
        whole = each.union(*touching)
        if touching:
            found[found.index(touching[0])] = whole
        else:
            found.append(whole)
        found = [other for other in found if other is whole or other not in touching[1:]]
    return found


def _family(
    patterns: Sequence[str], members: dict[str, list[tuple[str, Group]]], every: set[str], recipe: Recipe
) -> Family:
    globs: list[str] = []
    for pattern in patterns:
        paths = list(dict.fromkeys(path for path, _ in members[pattern]))
        glob = "*".join(literal(part) for part in _NUMBER.split(paths[0]))
        exact = len(paths) > 1 and {path for path in every if fnmatch.fnmatchcase(path, glob)} == set(paths)
        globs += [glob] if exact else map(literal, paths)
    found = [each for pattern in patterns for each in members[pattern]]
    pinned = any(fnmatch.fnmatchcase(path, rule.match) for path, _ in found for rule in recipe.layers
                 if rule.wbits is not None or rule.abits is not None)
    names = [pattern if len(members[pattern]) > 1 else members[pattern][0][0] for pattern in patterns]
    return Family(", ".join(names), tuple(globs), all(group.kind in LINEARS for _, group in found),
                  any(group.softmax is not None for _, group in found), pinned)


def _pattern(path: str) -> str:
    return _NUMBER.sub("*", path)
