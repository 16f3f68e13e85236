"""What compiling would do to a model: captured and matched, not calibrated."""

from __future__ import annotations

import math
from typing import Any, cast

from repquant_fx.inspection.table import Inspection, Row, kind_of, totals


def inspect_model(model: Any, recipe: Any = None, **options: Any) -> Inspection:
    """What `compile` would match, and why not, without calibrating anything.

    Args:
        model, options: as for `compile`: `arch`, `input_shape`, `allow_pickle`, `task`, `example_inputs`.

    Raises:
        InputError: the model cannot be loaded or captured.
    """
    from torch.fx import Node

    from repquant_fx.frontends.memory import left_as_found
    from repquant_fx.options import Source
    from repquant_fx.passes.base import shape_of
    from repquant_fx.preparation import match

    matched = left_as_found(lambda model: match(Source(model, **options), recipe))(model)
    rows = []
    for group in matched.plan.groups:
        weights = [] if group.kind == "matmul" else [
            (group.plans[c].wbits, math.prod(map(int, shape_of(cast(Node, c.args[1]))))) for c in group.consumers]
        for site in group.sites:
            behind = [w for w, c in zip(weights, group.consumers) if c in site.consumers]
            rows.append(Row(site.name, [_path(c) for c in site.consumers], kind_of(group.kind, site.name), site.bits,
                            [bits for bits, _ in behind], rewritten=list(group.notes),
                            parameters=sum(count for _, count in behind)))
    products = sum(len(group.consumers) for group in matched.plan.groups if group.kind == "matmul")
    chosen = matched.recipe
    about = {"bits": chosen.bits, **totals(rows, products), "recipe": chosen.to_dict()}
    left = [{"path": item.path, "operator": item.operator, "reason": item.reason} for item in matched.plan.left_alone]
    return Inspection(matched.loaded.source, False, rows, left, about)


def _path(node: Any) -> str:
    from repquant_fx.passes.base import module_path

    return module_path(node) or str(node.name)
