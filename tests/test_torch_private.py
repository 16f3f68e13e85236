"""What torch does not promise to keep does here what the package relies on, and no other file uses any of it."""

from __future__ import annotations

import ast
import io
import pickle
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from test_imports import modules
from torch import Tensor, nn

from repquant_fx import torch_private as private

aten = torch.ops.aten
PRIVATE_ATTRIBUTES = {"_schema", "_example_inputs", "_modules", "_parameters", "_buffers", "_version"}
UNDOCUMENTED = {
    "torch.nn.modules.module",
    "torch.fx.experimental.symbolic_shapes",
    "torch.export.dynamic_shapes",
    "torch.export.pt2_archive",
}


class Table(nn.Module):
    """Embeds positions: a length beyond its 12 rows is one that torch.export wants bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions[: x.shape[1]]


def archive(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    """Free in dimension 1, from 2 to 12."""
    length = torch.export.Dim("length", min=2, max=12)
    return torch.export.export(Table(), (torch.ones(1, 5, 4),), dynamic_shapes=({1: length},))


@pytest.fixture(scope="module")
def length(program: torch.export.ExportedProgram) -> torch.SymInt:
    return next(n.meta["val"] for n in program.graph.nodes if n.name == "x").shape[1]


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of torch in a file: modules imported, and what is reached from `torch` by attributes."""

    def is_private(name: str) -> bool:
        if not re.fullmatch(r"torch\.[\w.]+", name):
            return False
        return bool(re.search(r"\._[^_]", name)) or any(name.startswith(module) for module in UNDOCUMENTED)

    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if node.attr in PRIVATE_ATTRIBUTES:
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in PRIVATE_ATTRIBUTES:
                yield node.value
            names = [node.value]
        yield from filter(is_private, names)


def test_no_other_file_spells_a_private_name() -> None:
    found = {
        name: sorted(set(private_names(ast.parse(path.read_text(encoding="utf-8")))))
        for name, path in modules().items()
    }
    assert found.pop("repquant_fx.torch_private")
    assert {name: names for name, names in found.items() if names} == {}


def test_what_counts_as_private() -> None:
    text = (
        "from torch._ops import A\nfrom torch.utils import _pytree\nimport torch.nn\n"
        "torch._C.f(f(n)._schema.name)\n_x.y\nf('torch._tensor.g', '_modules', 'see torch._ops')"
    )
    assert sorted(set(private_names(ast.parse(text)))) == [
        "_modules",
        "_schema",
        "torch._C",
        "torch._C.f",
        "torch._ops.A",
        "torch._tensor.g",
        "torch.utils._pytree",
    ]


def test_archive_reader() -> None:
    reader = private.archive_reader(archive({"a": torch.ones(3)}))
    assert "data.pkl" in reader.get_all_records()
    assert reader.get_record_size("data.pkl") == len(reader.get_record("data.pkl")) > 0
    with pytest.raises(RuntimeError):
        private.archive_reader(b"no archive")


def test_an_archive_reader_without_sizes() -> None:
    """As torch 2.9 has it."""
    data = archive({"a": torch.ones(3)})
    reader = private.SizedReader(torch._C.PyTorchFileReader(io.BytesIO(data)), data)
    for record in reader.get_all_records():
        assert reader.get_record_size(record) == len(reader.get_record(record))


def test_allowed_globals() -> None:
    """What torch admits by default; a class that it refuses is not in it."""
    allowed = private.allowed_globals()
    assert {"torch._utils._rebuild_tensor_v2", "collections.OrderedDict"} <= allowed
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(archive(ast.Name("x"))), weights_only=True)
    assert not {name for name in allowed if name.startswith(("ast.", "os.", "torch.nn.modules."))}


def test_a_program_from_its_document(program: torch.export.ExportedProgram) -> None:
    """The document and the tensors in a file give the program that torch itself reads from it."""
    import json

    file = io.BytesIO()
    torch.export.save(program, file)
    reader = private.archive_reader(file.getvalue())
    document = json.loads(reader.get_record("models/model.json"))
    built = private.build_program(document, program.state_dict, program.constants)
    x = torch.randn(1, 7, 4)
    assert torch.equal(built.module()(x), private.load_archive(file.getvalue()).module()(x))
    private.add_samples(built, ((x,), {}))
    assert built.example_inputs is not None and built.example_inputs[0][0] is x


def test_dtype_codes(program: torch.export.ExportedProgram) -> None:
    codes = private.dtype_codes()
    assert {torch.float32, torch.int64, torch.bool} <= set(codes.values()) and all(
        isinstance(code, int) for code in codes
    )


def test_operators() -> None:
    add = aten.add_.Tensor
    assert isinstance(add, private.OpOverload)
    schema = private.schema(add)
    assert schema.name == "aten::add_" and schema.is_mutable and not private.schema(aten.add.Tensor).is_mutable
    assert [a.name for a in schema.arguments] == ["self", "other", "alpha"] and schema.arguments[2].default_value == 1
    assert schema.arguments[0].alias_info.is_write and str(schema.arguments[1].type) == "Tensor"
    assert private.has_kernel(add)


def test_an_operator_that_only_torchscript_has() -> None:
    assert not private.has_kernel(aten.index.Tensor_hacked_twin)


def test_native_functions() -> None:
    assert (
        private.native_functions().__name__ == "torch._C._nn" and nn.functional.gelu is private.native_functions().gelu
    )


def test_fake_tensors_are_recomputed_without_guards(
    program: torch.export.ExportedProgram, length: torch.SymInt
) -> None:
    value = next(n.meta["val"] for n in program.graph.nodes if n.name == "x")
    mode = private.fake_mode(value)
    assert mode is not None and private.fake_mode(torch.ones(1)) is None
    with private.propagating(mode), mode:
        assert bool(length == 5)  # its example size; a guard would make it constant
        result = value + torch.ones(4)
    assert result.shape[1] is not 5 and isinstance(result.shape[1], torch.SymInt)  # noqa: F632
    assert private.largest_size(length) == 12


def test_fake_runs_say_where_values_decide() -> None:
    mode = private.FakeTensorMode(allow_fallback_kernels=False)
    free = private.FakeTensorMode(shape_env=private.shape_environment())
    with mode, pytest.raises(private.value_errors()):
        torch.ones(3).nonzero()
    with free, pytest.raises(private.value_errors()):
        bool(torch.ones(3).nonzero().shape[0] > 2)


def test_sizes(length: torch.SymInt) -> None:
    assert private.size_hint(7) == 7 and private.size_hint(length) == 5 and private.largest_size(length) == 12
    free = torch.export.export(nn.ReLU(), (torch.ones(3, 2),), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert private.largest_size(next(n for n in free.graph.nodes if n.op == "placeholder").meta["val"].shape[0]) is None


def test_suggested_shapes() -> None:
    """An export that fails for want of a bound succeeds with what the message suggests."""
    x, shapes = torch.ones(1, 5, 4), ({1: torch.export.Dim("length")},)
    with pytest.raises(Exception, match="Suggested fixes") as caught:
        torch.export.export(Table(), (x,), dynamic_shapes=shapes)
    refined = private.suggested_shapes(caught.value, shapes)
    torch.export.export(Table(), (x,), dynamic_shapes=refined).module()(torch.ones(1, 12, 4))
    assert private.suggested_shapes(ValueError("no advice"), shapes) is None


def exported_nodes(function: Callable[[Tensor], Tensor]) -> tuple[list[str], bool]:
    """Operators of the ONNX file of a function, and whether torch traced its program again."""
    from torch.onnx._internal.exporter import _fx_passes

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    program, traced = torch.export.export(Model(), (torch.ones(2, 3),)), []
    decompose = _fx_passes.decompose_with_registry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fx_passes, "decompose_with_registry", lambda *a: traced.append(a) or decompose(*a))
        with private.quick_translation():
            made = torch.onnx.export(program, (), dynamo=True, optimize=False, verbose=False)
    assert made is not None
    return [node.op_type for node in made.model.graph], bool(traced)


def test_quick_translation() -> None:
    """A program in translated operators is not traced again; any other is, and one that writes into its values."""
    from torch.onnx._internal.exporter import _fx_passes, _registration

    before = _fx_passes.decompose_with_registry, _registration.ONNXRegistry.__dict__["from_torchlib"]
    assert exported_nodes(lambda x: x.relu() + x) == (["Relu", "Add"], False)
    nodes, traced = exported_nodes(lambda x: torch.special.xlog1py(x, x))
    assert traced and "Log" in nodes
    nodes, traced = exported_nodes(lambda x: x.clone().add_(x).relu())
    assert traced and nodes[-2:] == ["Add", "Relu"]
    assert before == (_fx_passes.decompose_with_registry, _registration.ONNXRegistry.__dict__["from_torchlib"])


def test_translations_of_one_export_are_not_those_of_the_next() -> None:
    """What an export brings for an operator is gone afterwards."""
    from onnxscript import opset21 as op

    program = torch.export.export(nn.ReLU(), (torch.ones(2),))
    table = {aten.relu.default: lambda x: op.Neg(op.Neg(x))}
    for more, expected in ((table, ["Neg", "Neg"]), (None, ["Relu"])):
        with private.quick_translation():
            made = torch.onnx.export(
                program, (), dynamo=True, optimize=False, verbose=False, custom_translation_table=more
            )
        assert made is not None and [node.op_type for node in made.model.graph] == expected


def test_watched_registration() -> None:
    tensors, children = [], []
    with private.watched_registration(
        lambda module, name, value: tensors.append(name), lambda module, name, value: children.append(name)
    ):
        nn.Sequential(nn.BatchNorm1d(2))
    assert {"weight", "bias", "running_mean"} <= set(tensors) and children == ["0"]
    nn.Linear(2, 2)
    assert len(tensors) == 5


def test_parameters_on_meta() -> None:
    with private.parameters_on_meta():
        module = nn.BatchNorm1d(4)
    assert module.weight.is_meta and module.running_mean is not None and not module.running_mean.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_dispatch_mode_and_pytree() -> None:
    called = []

    class Recorder(private.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
        ) -> object:
            called.append(func)
            return func(*args)  # type: ignore[operator]

    with Recorder():
        torch.ones(2).detach().neg()
    assert aten.neg.default in called
    leaves, spec = private.pytree.tree_flatten(({"a": 1}, [2]))
    assert (
        private.pytree.tree_unflatten(leaves, spec)
        == ({"a": 1}, [2])
        == private.pytree.tree_map(lambda leaf: leaf, ({"a": 1}, [2]))
    )
