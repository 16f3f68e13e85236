"""Where the code of admitted classes fetches or sets attributes under names that are data, calls, or imports.

The table says of each why a file cannot use it. A new version of a library that adds one fails here until somebody has
looked.

Models of transformers need no table: one out of a pickle is built anew from its configuration, and only tensors are
taken, so no attribute of the file reaches a `forward`. What the configuration says, plain data, a `config.json` says
too. That is what the last test looks at.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from language import make as make_language_model
from torch import Tensor, nn

from repquant_fx.errors import ModelFileError
from repquant_fx.frontends.members import class_body, looks_up_by_name
from repquant_fx.frontends.pickled import load_pickled  # noqa: F401 (what is admitted is imported with it)
from repquant_fx.frontends.rebuilt import rebuild
from repquant_fx.frontends.state import check_state

PACKAGES = ("torch.nn.modules", "timm.layers", "timm.models", "torchvision.models", "torchvision.ops")
_OWN = "names of its children and tensors: a name of a method is refused by the state check"
_NUMBERED = "the name is written in the code but for a number"
_REQUEST = "changes the model when a user asks for it; no forward calls it"
_TORCH = "torch's own access to children; looks in the modules for a path, gives no attribute of the class"
TABLE = {
    _OWN: [
        "dla.DLA.forward_intermediates",
        "inception_resnet_v2.InceptionResnetV2.forward_intermediates",
        "inception_v3.InceptionV3.forward_intermediates",
        "nasnet.NASNetALarge.forward_intermediates",
        "pnasnet.PNASNet5Large.forward_intermediates",
        "regnet.RegNet.forward_intermediates",
        "resnet.ResNet.forward_intermediates",
        "senet.SENet.forward_intermediates",
        "container.ParameterDict.__getitem__",
        "container.ParameterDict.__setitem__",
        "container.ParameterDict.__delitem__",
        "rnn.RNNBase._init_flat_weights",
        "rnn.RNNBase._weights_have_changed",
        "rnn.RNNBase.__setstate__",
        "rnn.RNNBase.all_weights",
    ],
    _NUMBERED: [
        "container.Sequential.__setitem__",
        "container.Sequential.__delitem__",
        "container.ModuleList.__setitem__",
        "container.ModuleList.__delitem__",
        "container.ParameterList.__getitem__",
        "container.ParameterList.__setitem__",
        "coat.CoaT.forward_intermediates",
        "crossvit.CrossVit.__init__",
        "crossvit.CrossVit.no_weight_decay",
        "fastvit.FastVit.forward_features",
        "xception.Xception.forward_intermediates",
    ],
    _REQUEST: [
        "byobnet.Stem.prune_to_tap",
        "iformer.IFormer.fuse",
        "repvit.RepVit.fuse",
        "shvit.SHViT.fuse",
        *(
            f"{name}.prune_intermediate_layers"
            for name in (
                "coat.CoaT",
                "dla.DLA",
                "hrnet.HighResolutionNet",
                "inception_resnet_v2.InceptionResnetV2",
                "inception_v3.InceptionV3",
                "nasnet.NASNetALarge",
                "pnasnet.PNASNet5Large",
                "regnet.RegNet",
                "resnet.ResNet",
                "senet.SENet",
                "visformer.Visformer",
                "xception.Xception",
            )
        ),
    ],
    _TORCH: [
        "module.Module.get_submodule",
        "module.Module.set_submodule",
        "module.Module.get_parameter",
        "module.Module.get_buffer",
        "module.Module._load_from_state_dict",
    ],
    "runs in a constructor, which a file does not call": [
        "rnn.RNNBase.__init__",
        "shufflenetv2.ShuffleNetV2.__init__",
    ],
    "a class of generated source, which is not admitted": ["feature_extraction.DualGraphModule.__deepcopy__"],
}


def _classes(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield f"{prefix}.{node.name}", node
            yield from _classes(node, f"{prefix}.{node.name}")


def _methods() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(module.Class.method, its code) of every class in the packages that a file may name."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if not re.search(
                r"attr(getter)?\(|\b(eval|exec|__import__|import_module|get_(submodule|parameter|buffer))\(", text
            ):
                continue
            for name, node in _classes(ast.parse(text), path.stem):
                yield from (
                    (f"{name}.{method.name}", method) for method in node.body if isinstance(method, ast.FunctionDef)
                )


def test_every_lookup_by_name_is_in_the_table() -> None:
    found = {name for name, method in _methods() if looks_up_by_name(method)}
    known = {name for names in TABLE.values() for name in names}
    assert not found - known, "look at these, and say in the table why a file cannot use them"
    assert len(found) > 20


@pytest.mark.parametrize(
    "source",
    ["getattr(self, name)", "setattr(x, f'{n}', 1)", "eval(x)", "__import__(x)", "importlib.import_module(x)"],
)
def test_the_search_finds(source: str) -> None:
    assert looks_up_by_name(ast.parse(source)) and not looks_up_by_name(ast.parse("getattr(self, 'a'); model.eval()"))


def test_methods_with_names_from_data_belong_to_classes_that_the_state_check_knows() -> None:
    import timm.models  # noqa: F401

    from repquant_fx.frontends.members import members_of

    for name in TABLE[_OWN]:
        stem, cls, _ = name.split(".")
        homes = [module for full, module in sys.modules.items() if full.endswith(f".{stem}") and hasattr(module, cls)]
        assert any(members_of(getattr(module, cls)).looks_up for module in homes), name


def test_whatever_is_called_is_a_layer_or_an_activation() -> None:
    """For each attribute that a method calls: neither an object nor a function nor a method may be there."""
    import timm.layers
    import timm.models  # noqa: F401

    judged = 0
    for module in [
        module for full, module in sys.modules.items() if full.startswith(("torch.nn.modules.", "timm.layers."))
    ]:
        for cls in [
            value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)
        ]:
            for name in _called(cls) - set(dir(cls)):
                blank = cls.__new__(cls)
                nn.Module.__init__(blank)
                for value in (argparse.Namespace(), print, "".join):
                    vars(blank)[name] = value
                    with pytest.raises(ModelFileError):
                        check_state(blank, "m.pt")
                judged += 1
    assert judged > 200


def _called(cls: type) -> set[str]:
    """Attributes of self that the methods of a class call."""
    return {
        node.func.attr
        for statement in class_body(cls)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    }


class Mark:
    """What a file may have put anywhere."""


@pytest.mark.parametrize("name", ["bert", "llama", "opt", "vit", "clip"])
def test_no_attribute_of_a_file_reaches_a_model_of_transformers(name: str) -> None:
    model = make_language_model(name)
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        state, own = vars(module), vars(nn.Module())
        state.update(made_up=Mark())
        if not module._modules and not type(module).__module__.startswith("transformers."):
            continue  # a layer of torch keeps what its class has, once `check_state` has judged it
        plain = (bool, int, float, str)  # of these a change is refused
        for attribute in [key for key, value in state.items() if key not in own and type(value) not in plain]:
            if attribute != "config" or module is not model:
                state[attribute] = Mark()
        state.update(forward=Mark(), _odd=Mark())
        for hidden in dir(type(module)):
            if not hidden.startswith("__") and hidden not in state:
                state[hidden] = Mark()
    found = list(_reachable(rebuild(model, "m.pt", lambda module, path: module)))
    assert len(found) > 100 and not any(isinstance(value, Mark) for value in found)
    assert {id(value) for value in found if isinstance(value, Tensor)} >= tensors


def _reachable(value: object, seen: set[int] | None = None) -> Iterator[object]:
    """All that can be reached by attributes and items, classes, modules and functions excepted."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (type, type(sys), type(_reachable))):
        return
    seen.add(id(value))
    yield value
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else []
    inner += list(value) if isinstance(value, (list, tuple, set, frozenset)) else []
    for item in [*inner, *getattr(value, "__dict__", {}).values()]:
        yield from _reachable(item, seen)
