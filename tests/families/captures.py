"""Each family captured once a session, for all tests of families. What is returned must not be changed."""

from __future__ import annotations

import functools
import warnings

from models import FAMILIES, Inputs
from torch import nn

from repquant_fx.errors import RepQuantWarning
from repquant_fx.frontends.capture import Captured, capture


def keywords(inputs: Inputs) -> list[str] | None:
    return None if list(inputs) == ["x"] else list(inputs)


@functools.cache
def model(name: str) -> nn.Module:
    return FAMILIES[name].model()


@functools.cache
def captured(name: str) -> Captured:
    family = FAMILIES[name]
    example = family.inputs(2, 7, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RepQuantWarning)
        return capture(
            model(name),
            list(example.values()),
            input_names=keywords(example),
            dynamic_axes=family.free(list(example)),
            outputs=family.outputs,
        )
