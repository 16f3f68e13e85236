"""Codes around the middle of uint8 are written as int8: the same values, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from repquant_fx.exporters.signed_codes import sign_codes
from repquant_fx.parity import expose
from repquant_fx.runtime import session

TEXT = """<ir_version: 10, opset_import: ["": 21]>
main (float[N, 4] x) => ({outputs})
<float s = {{0.1}}, uint8 z = {{{zero_point}}}> {{
  codes = QuantizeLinear (x, s, z)
  {between}
  y = DequantizeLinear ({read}, s, z)
}}"""


def model(zero_point: int = 128, between: str = "", read: str = "codes", outputs: str = "float[N, 4] y") -> ir.Model:
    proto = parser.parse_model(TEXT.format(zero_point=zero_point, between=between, read=read, outputs=outputs))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def test_the_same_values_in_signed_codes() -> None:
    x = np.linspace(-14, 14, 64, dtype=np.float32).reshape(16, 4)
    given = model()
    expected = session(ir.to_proto(given), optimize=False).run(None, {"x": x})[0]
    assert sign_codes(given) == 1 and sign_codes(given) == 0
    proto = ir.to_proto(given)
    onnx.checker.check_model(proto, full_check=True)
    quantize = proto.graph.node[0]
    zero = next(tensor for tensor in proto.graph.initializer if tensor.name == quantize.input[2])
    assert zero.data_type == onnx.TensorProto.INT8 and {node.input[2] for node in proto.graph.node} == {zero.name}
    np.testing.assert_array_equal(session(proto).run(None, {"x": x})[0], expected)


def test_the_check_sees_the_codes_that_they_stand_for() -> None:
    x, given = np.linspace(-20, 20, 64, dtype=np.float32).reshape(16, 4), model()
    exposed = [expose(ir.to_proto(given), [("codes", True)])]
    sign_codes(given)
    exposed.append(expose(ir.to_proto(given), [("codes", True)]))
    unsigned, signed = (session(each).run(None, {"x": x})[1] for each in exposed)
    assert unsigned.dtype == np.uint8 and unsigned.min() == 0 and unsigned.max() == 255
    np.testing.assert_array_equal(signed, unsigned)


@pytest.mark.parametrize("changes", [
    {"zero_point": 127},
    {"between": "moved = Identity (codes)", "read": "moved"},
    {"outputs": "float[N, 4] y, uint8[N, 4] codes"},
])
def test_what_is_left_as_it_is(changes: dict) -> None:
    given = model(**changes)
    before = ir.to_proto(given).SerializeToString()
    assert sign_codes(given) == 0 and ir.to_proto(given).SerializeToString() == before
