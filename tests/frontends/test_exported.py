"""`.pt2` files: what torch.export.save writes loads, and each way to execute code while loading is refused first."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repquant_fx.errors import ModelFileError
from repquant_fx.frontends.exported import load_exported
from repquant_fx.frontends.pt2_expressions import is_safe_expression
from repquant_fx.frontends.pt2_operators import is_safe_target

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[1] // 2
        return self.fc(self.norm(x))[:, :half].reshape(x.shape[0], -1) + self.shift.repeat(half)


@functools.cache
def program_bytes() -> bytes:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(Tiny().eval(), (torch.randn(2, 6, 4),), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def rewritten(change: Callable[[dict[str, bytes]], None]) -> bytes:
    """The program's archive after `change` to its records."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(program_bytes()))
    records = {
        name: bytes(reader.get_record(name)) for name in reader.get_all_records() if not name.startswith(".data")
    }
    change(records)
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, content in records.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return buffer.getvalue()


def with_json(record: str, change: Callable[[Any], None]) -> bytes:
    def edit(records: dict[str, bytes]) -> None:
        document = json.loads(records[record])
        change(document)
        records[record] = json.dumps(document).encode()

    return rewritten(edit)


def graph(document: Any) -> Any:
    return document["graph_module"]["graph"]


class Call:
    def __init__(self, sentinel: Path) -> None:
        self.command = f"echo ran > {sentinel}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def expression(sentinel: Path) -> str:
    return f"__import__('os').system('echo ran > {sentinel}')"


def test_program_loads_with_its_inputs() -> None:
    program, inputs, stored = load_exported(program_bytes(), "m.pt2")
    reference = torch.export.load(io.BytesIO(program_bytes()))
    assert stored and [tuple(t.shape) for t in inputs] == [(2, 6, 4)]
    assert torch.equal(inputs[0], reference.example_inputs[0][0])
    assert torch.equal(program.module(check_guards=False)(*inputs), reference.module(check_guards=False)(*inputs))


def test_rewriting_alone_changes_nothing() -> None:
    """The attacks below differ from this file by one thing each."""
    program, _, _ = load_exported(rewritten(lambda records: None), "m.pt2")
    assert program.module(check_guards=False)(torch.zeros(3, 6, 4)).shape == (3, 9)


def test_inputs_are_drawn_where_none_are_stored() -> None:
    def forget(records: dict[str, bytes]) -> None:
        records[SAMPLES] = b""

    data = rewritten(forget)
    program, inputs, stored = load_exported(data, "m.pt2")
    again = load_exported(data, "m.pt2")[1]
    assert not stored and inputs[0].shape == (2, 6, 4) and torch.equal(inputs[0], again[0])
    assert program.module(check_guards=False)(*inputs).shape == (2, 9)


def hostile(kind: str, sentinel: Path) -> bytes:
    """A program whose document holds code. Long because it is the list of places where it may."""
    code = expression(sentinel)

    def sizes(document: Any) -> None:
        graph(document)["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}

    def hidden_as_metadata(document: Any) -> None:
        values = graph(document)["tensor_values"]
        values["metadata"] = json.loads(json.dumps(values["x"]))
        values["metadata"]["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}

    def target(document: Any) -> None:
        node = graph(document)["nodes"][-1]
        node["target"] = "torch.os.system"
        node["inputs"] = [{"name": "", "arg": {"as_string": f"echo ran > {sentinel}"}, "kind": 1}]

    def rename(document: Any, new: str = f"x=({code})") -> None:
        quoted = json.dumps(new)
        text = (
            json.dumps(document)
            .replace('"name": "x"', f'"name": {quoted}')
            .replace('"x": {"dtype"', f'{quoted}: {{"dtype"')
        )
        document.clear()
        document.update(json.loads(text))

    def attribute(document: Any) -> None:
        spec = next(s for s in document["graph_module"]["signature"]["input_specs"] if "parameter" in s)
        spec["parameter"]["parameter_name"] = f'fc.w", 0) or {code} or getattr(self, "x'

    def tree(document: Any) -> None:
        entry = document["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "y"}])
        entry["out_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": [
            {"type": None, "context": None, "children_spec": []}]}])

    def argument_names(document: Any) -> None:
        document["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x=({code})"]

    def constraint(document: Any) -> None:
        document["range_constraints"]["u99999999999"] = {"min_val": 0, "max_val": 1}

    documents = {"expression": sizes, "expression hidden as metadata": hidden_as_metadata, "target": target,
                 "placeholder name": rename, "attribute name": attribute, "tree spec": tree,
                 "argument names": argument_names, "counting": constraint}
    if kind in documents:
        return with_json(MODEL, documents[kind])
    payload = pickle.dumps(Call(sentinel), 2)
    buffer = io.BytesIO()
    torch.save(Call(sentinel), buffer)

    def constants(path: str) -> Callable[[dict[str, bytes]], None]:
        def edit(records: dict[str, bytes]) -> None:
            records["data/constants/model_constants_config.json"] = json.dumps({"config": {"c": {
                "path_name": path, "is_param": False, "use_pickle": True, "tensor_meta": None}}}).encode()
            records[f"data/constants/{path}"] = payload
        return edit

    def samples(records: dict[str, bytes]) -> None:
        records[SAMPLES] = buffer.getvalue()

    def pickled_weight(records: dict[str, bytes]) -> None:
        config = json.loads(records[WEIGHTS])
        meta = config["config"]["fc.weight"]
        meta["use_pickle"] = True
        records[WEIGHTS], records[f"data/weights/{meta['path_name']}"] = json.dumps(config).encode(), buffer.getvalue()

    def legacy_weights(records: dict[str, bytes]) -> None:
        records["data/weights/model.pt"] = buffer.getvalue()

    def library(records: dict[str, bytes]) -> None:
        records["data/aotinductor/model/x.so"] = b"\x7fELF"

    return rewritten(
        {
            "samples": samples,
            "pickled weight": pickled_weight,
            "legacy weights": legacy_weights,
            "library": library,
            "custom object": constants("custom_obj_0"),
            "opaque object": constants("opaque_obj_0"),
        }[kind]
    )


HOSTILE = {
    "expression": "expr_str",
    "expression hidden as metadata": "expr_str",
    "target": "target",
    "placeholder name": "name",
    "attribute name": "is not a name",
    "tree spec": "out_spec",
    "argument names": "forward_arg_names",
    "counting": "u99999999999",
    "samples": SAMPLES,
    "pickled weight": "fc.weight",
    "legacy weights": "data/weights/model.pt",
    "library": "aotinductor",
    "custom object": "custom_obj_0",
    "opaque object": "opaque_obj_0",
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_hostile_program_is_refused_and_does_not_run(kind: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    with pytest.raises(ModelFileError, match=r"refused before loading|is not a name") as caught:
        load_exported(hostile(kind, sentinel), "evil.pt2")
    assert HOSTILE[kind] in str(caught.value) and ("--allow-pickle" in str(caught.value) or kind == "attribute name")
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["samples", "expression", "pickled weight", "opaque object"])
def test_the_attacks_are_real(kind: str, tmp_path: Path) -> None:
    """torch itself runs them, so that the tests above prove something."""
    sentinel = tmp_path / "ran"
    try:
        load_exported(hostile(kind, sentinel), "evil.pt2", allow_pickle=True)
    except ModelFileError:
        pass  # what the attack leaves behind need not be a program
    assert sentinel.exists()


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s0', integer=True))",
        "s0",
        "FloorDiv(s0, 2)",
        "Equality(Symbol('u0'), Integer(-1))",
        "Pow(Symbol('s0'), Integer(2))",
        "Float('0.5', precision=53)",
        "Max(Integer(1), s3)",
    ],
)
def test_expressions_of_torch_pass(text: str) -> None:
    assert is_safe_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "Symbol('__import__')",
        "Add('1+1', 2)",
        "Integer('1')",
        "s0.__class__",
        "[s0 for s0 in x]",
        "lambda: 0",
        "S('1')",
        "sympify('x')",
        "Symbol('s0')(1)",
        "Pow(Integer(9), Integer(999999999))",
        "eval",
        "9**9",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Symbol(name='s0')",
        "Symbol('s0', commutative='x')",
        "(",
        "Add(*x)",
        "f's0'",
    ],
)
def test_other_expressions_do_not(text: str) -> None:
    assert not is_safe_expression(text)


def test_targets() -> None:
    good = ["torch.ops.aten.linear.default", "torch.ops.aten.sym_size.int", "_operator.mul", "torch.sym_max"]
    bad = [
        "torch.os.system",
        "torch.hub.load",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.nothing.default",
        "_operator.call",
        "torch.ops.load_library",
        "torch.ops.aten.linear.default.__class__",
        "_operator.attrgetter",
        "math.os",
        "#x:y",
    ]
    assert [target for target in good if not is_safe_target(target)] == []
    assert [target for target in bad if is_safe_target(target)] == []


def test_damaged_archives_are_named() -> None:
    with pytest.raises(ModelFileError, match=r"m\.pt2"):
        load_exported(program_bytes()[:3000], "m.pt2")
    with pytest.raises(ModelFileError, match=r"model\.json"):
        load_exported(rewritten(lambda records: records.update({MODEL: b"{"})), "m.pt2")
    with pytest.raises(ModelFileError, match="stores nothing"):
        load_exported(rewritten(lambda records: records.update({"data/weights/weight_0": b""})), "m.pt2")


def test_keyword_inputs_are_refused() -> None:
    program = torch.export.export(Tiny().eval(), (), {"x": torch.randn(2, 6, 4)})
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with pytest.raises(ModelFileError, match="positional"):
        load_exported(buffer.getvalue(), "m.pt2")
