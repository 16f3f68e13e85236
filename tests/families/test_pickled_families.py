"""Each family, saved whole with torch.save, loads without consent and computes what it did."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from models import FAMILIES

from repquant_fx.errors import ModelFileError
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.frontends.pickled import load_pickled

REFUSED = {"swin_features": "FeatureInfo"}  # an object with methods of its own


@pytest.mark.parametrize("name", list(FAMILIES))
def test_family_loads_and_computes_the_same(name: str) -> None:
    family, buffer = FAMILIES[name], io.BytesIO()
    model = family.model().eval()
    try:
        torch.save(model, buffer)
    except (AttributeError, pickle.PicklingError) as error:
        pytest.skip(f"cannot be pickled: {error}")
    if name in REFUSED:
        with pytest.raises(ModelFileError, match=REFUSED[name]):
            load_pickled(buffer.getvalue(), "m.pt")
        return
    loaded = load_pickled(buffer.getvalue(), "m.pt")
    inputs = family.inputs(2, 16, 0)
    images = (inputs.pop("x"),) if "x" in inputs else ()
    with torch.no_grad():
        expected, found = tensors_in(model(*images, **inputs)), tensors_in(loaded(*images, **inputs))
    assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True)) and type(loaded) is type(model)
