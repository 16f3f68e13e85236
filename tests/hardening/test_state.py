"""Known classes with a state that no constructor makes: refused by name and path, and nothing runs.

Long because it is a list of states.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import as_key, torch_file, torch_zip
from timm.layers.layer_scale import LayerScale
from timm.models._features import FeatureHookNet
from timm.models.metaformer import Scale
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.xlm.modeling_xlm import XLMPredLayer

from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends.loading import load_model
from repquant_fx.frontends.pickled import load_pickled
from repquant_fx.frontends.state import check_state


@pytest.fixture(autouse=True)
def _nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "RAN").exists()


def blank(cls: type[nn.Module], **state: Any) -> nn.Module:
    """An instance with any attributes; its constructor does not run."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    vars(made).update(state)
    return made


def config(names: dict[str, str], **more: Any) -> Any:
    """A configuration whose attribute `a` is its attribute `b`, if a file may say so."""
    made = BertConfig()
    vars(made).update(more, attribute_map=names)
    return made


def links() -> list[nn.Module]:
    """Five modules that hand each other what they need to call os.system, each by the attributes it was given."""
    first, last = config({"mul_": "from_dict"}), config({"log_prob": "update", "view": "system"})
    built = {
        "dtype": "_import_dotted_name",
        "attribute_map": {"mul_": "dtype", "to_json_string": "validate_layer_type"},
    }
    hooks = config({"get_output": "get_text_config"}, text_config=first)
    return [
        blank(FeatureHookNet, hooks=hooks, return_dict=True),
        blank(LayerScale, inplace=True, gamma=built),
        blank(LayerScale, inplace=True, gamma="os.__dict__"),
        blank(XLMPredLayer, asm=True, proj=last),
        blank(Scale, scale=last, shape="touch RAN"),
    ]


def test_the_chain(tmp_path: Path) -> None:
    model = nn.Sequential(*links())
    torch.save(model, "bare.pt")
    model.config = argparse.Namespace(image_size=8, num_channels=3)  # type: ignore[assignment]
    torch.save(model, "m.pt")
    for name in ("bare.pt", "m.pt"):
        with pytest.raises(ModelFileError, match=r"config|hooks"):
            load_model(name, input_shape=(3, 8, 8))


@pytest.mark.parametrize(
    ("index", "message"),
    enumerate(
        [
            "`hooks` is a BertConfig",
            "`gamma` is a dict where LayerScale holds a Parameter",
            "`gamma` is a str where LayerScale holds a Parameter",
            "XLMPredLayer outside of a model of transformers",
            "`scale` is a BertConfig",
        ]
    ),
)
def test_each_link_of_the_chain(index: int, message: str) -> None:
    for model in (links()[index], nn.Sequential(nn.Linear(2, 2), links()[index])):
        with pytest.raises(ModelFileError, match=message):
            load_pickled(torch_file(model), "m.pt")


def test_the_message_has_the_path() -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.ModuleDict({"ls1": links()[2]}))})
    with pytest.raises(ModelFileError, match=r"m\.pt, blocks\.0\.ls1: `gamma` is a str where LayerScale holds"):
        load_pickled(torch_file(model), "m.pt")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def tampered(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    inner: Any = model[0]
    state = vars(inner)
    if kind == "a module as a parameter":
        state["_parameters"]["weight"] = nn.ReLU()
    elif kind == "a parameter as a child":
        state["_parameters"].pop("bias")
        state["_modules"]["bias"] = nn.ReLU()
    elif kind == "a child that is a number":
        state["_modules"]["x"] = 3
    elif kind == "a buffer that is a str":
        state["_buffers"]["x"] = "os"
    elif kind == "a str for a number":
        state["in_features"] = "os"
    elif kind == "children in an object of its own":
        state["_modules"] = ["a"]
    elif kind == "children that list something else":
        state["_modules"] = OrderedDict()
        vars(state["_modules"])["values"] = nn.functional.relu
        state["x"] = state["_modules"]
    elif kind == "a method hidden":
        state["extra_repr"] = nn.functional.relu
    elif kind == "a dunder":
        state["__call__"] = 1
    elif kind == "a parameter twice":
        state["weight"] = torch.ones(2, 2)
    elif kind == "a layer in a list":
        state["x"] = [nn.ReLU()]
    elif kind == "a configuration":
        state["x"] = {"a": [BertConfig()]}
    elif kind == "deep":
        state["x"] = nested(200)
    elif kind == "wide":
        value: Any = [1]
        for _ in range(40):
            value = [value, value]
        state["x"] = value
    elif kind == "a huge number":
        state["x"] = 10**400
    elif kind == "a long range":
        state["x"] = range(10**12)
    return model


@pytest.mark.parametrize(
    "kind",
    [
        "a module as a parameter",
        "a parameter as a child",
        "a child that is a number",
        "a buffer that is a str",
        "a str for a number",
        "children in an object of its own",
        "children that list something else",
        "a method hidden",
        "a dunder",
        "a parameter twice",
        "a layer in a list",
        "a configuration",
        "deep",
        "wide",
        "a huge number",
        "a long range",
    ],
)
def test_state_that_no_constructor_makes(kind: str) -> None:
    load_pickled(torch_file(tampered("nothing")), "m.pt")
    with pytest.raises(ModelFileError) as caught:
        load_pickled(torch_file(tampered(kind)), "m.pt")
    assert "\n" not in str(caught.value)


def test_a_class_that_looks_up_attributes_by_name_gets_no_method() -> None:
    model = nn.LSTM(2, 2)
    load_pickled(torch_file(model), "m.pt")
    model._all_weights = [["register_forward_hook"]]
    with pytest.raises(ModelFileError, match="register_forward_hook"):
        load_pickled(torch_file(model), "m.pt")


def test_attributes_of_a_tensor_do_not_hide_its_methods() -> None:
    model = nn.Linear(2, 2)
    model.weight.view = "os"  # type: ignore[method-assign,assignment]
    assert not vars(load_pickled(torch_file(model), "m.pt").weight)


# ---- models of transformers -----------------------------------------------------------------------------------------


def bert(**changes: Any) -> Any:
    settings = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    model = BertModel(settings).eval()
    vars(model.config).update(changes)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"attribute_map": {"hidden_size": "vocab_size"}},
        {"model_type": "other"},
        {"to_dict": 1},
        {"get_text_config": "x"},
        {"hidden_act": "os.system"},
        {"hidden_size": nn.ReLU()},
        {"num_hidden_layers": 10**9},
        {"quantization_config": {"a": 1}},
        {"auto_map": {"AutoModel": "m.M"}},
        {"use_kernels": True},
        {"_use_kernels": True},
        {"kernel_config": {"RMSNorm": "someone/kernels:Norm"}},
        {"gguf_file": "other.gguf"},
        {"custom_generate": "someone/code"},
        {"configuration_files": ["config.4.0.0.json"]},
        {"experts_implementation": "someone/kernels"},
        {"x": argparse.Namespace()},
        {"x": nested(50)},
        {"x": 10**400},
        {"problem_type\n": 1},
    ],
    ids=lambda changes: ascii(next(iter(changes))),
)
def test_configurations(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        load_pickled(torch_file(bert(**changes)), "m.pt")
    assert "\n" not in str(caught.value)


def test_nothing_of_the_file_but_tensors() -> None:
    model = bert(dtype="os.__dict__", tokenizer_file="elsewhere")
    vars(model)["_use_kernels"] = True
    vars(model)["base_model_prefix"] = "config"
    vars(model.encoder)["layer_names"] = "os.__dict__"
    vars(model.pooler.dense)["config"] = "os.__dict__"
    loaded = load_pickled(torch_file(model), "m.pt")
    assert not loaded.use_kernels and loaded.base_model_prefix == "bert"
    assert not hasattr(loaded.config, "tokenizer_file")
    assert not hasattr(loaded.encoder, "layer_names") and not hasattr(loaded.pooler.dense, "config")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_layers_of_torch_keep_what_was_changed() -> None:
    model = bert()
    model.pooler.dense = nn.Linear(8, 3)
    model.encoder.layer[0].output.LayerNorm.eps = 0.5
    loaded, ids = load_pickled(torch_file(model), "m.pt"), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).pooler_output, model(ids).pooler_output)


def test_other_layers_must_be_those_of_the_configuration() -> None:
    model = bert()
    model.encoder.layer.append(bert().encoder.layer[0])
    with pytest.raises(ModelFileError, match=r"encoder\.layer differs in its layers 1"):
        load_pickled(torch_file(model), "m.pt")
    model = bert()
    model.pooler = links()[2]
    with pytest.raises(ModelFileError, match="pooler is a LayerScale where the configuration makes a BertPooler"):
        load_pickled(torch_file(model), "m.pt")


# ---- little files that ask for much ---------------------------------------------------------------------------------


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def _keys(levels: int, times: int) -> bytes:
    """A set of one tuple, many times over: each is hashed anew, all the way down."""
    code = b"K\x01q\x00"
    for level in range(levels):
        code += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return b"\x80\x02cbuiltins\nset\n](" + code + (b"h" + bytes([levels])) * times + b"e\x85R."


@pytest.mark.parametrize(
    "value",
    [
        Calls(bytearray, 3_000_000_000),
        Calls(frozenset, range(10**9)),
        Calls(set, range(10**9)),
        Calls(torch.FloatTensor, 10**10),
        Calls(torch.FloatStorage, 10**10),
        Calls(OrderedDict, range(10**9)),
    ],
    ids=["bytearray", "frozenset", "set", "tensor", "storage", "dict"],
)
def test_little_files_that_ask_for_much(value: Any) -> None:
    for data in (torch_file({"a": value}), torch_file(value), torch_file(blank(nn.Identity, x=value))):
        assert len(data) < 4_000
        with pytest.raises(ModelFileError, match=r"bytearray|something that is not a list|memory|harmless"):
            load_pickled(data, "m.pt")


def test_keys_that_take_for_ever() -> None:
    for data in (_keys(20, 100), as_key(b"N" + b"\x85" * 1_000_000)):
        with pytest.raises(ModelFileError, match="measure"):
            load_pickled(torch_zip(data), "m.pt")


def test_a_tensor_that_claims_more_than_it_holds() -> None:
    model = nn.Sequential(nn.ReLU())
    model.register_buffer("x", torch.ones(1).expand(1_000, 1_000, 10))
    with pytest.raises(ModelFileError, match=r"x claims 40\.0 MB"):
        load_pickled(torch_file(model), "m.pt")
    assert load_pickled(torch_file({"a": torch.ones(1).expand(5)}), "m.pt")["a"].shape == (5,)


def test_deep_tuples() -> None:
    for levels in (99, 5_000, 1_000_000):
        data = b"\x80\x02}X\x01\x00\x00\x00aN" + b"\x85" * levels + b"s."
        try:
            load_pickled(torch_zip(data), "m.pt")
        except ModelFileError as error:
            assert "measure" in str(error)
        else:
            assert levels < 100


def test_a_partial_of_a_class_is_held() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    vars(model)["norm_layer"] = functools.partial(nn.LayerNorm, eps=1e-3)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert load_pickled(buffer.getvalue(), "m.pt").norm_layer.keywords == {"eps": 1e-3}
    vars(model)["norm_layer"] = functools.partial(os.system, "touch RAN")
    with pytest.raises(ModelFileError, match="system"):
        load_pickled(torch_file(model), "m.pt")


@pytest.mark.parametrize("method", ["values", "items"])
def test_children_behind_a_method_of_their_dict(method: str) -> None:
    """torch lets a file set attributes of an ordered dict; `model._modules.values` is then whatever the file says."""
    name = f"X{chr(len(method))}\0\0\0{method}"
    modules = f"ccollections\nOrderedDict\n)R}}{name}ctorch.nn.modules.activation\nReLU\nsb"
    sequential = f"ctorch.nn.modules.container\nSequential\n)\x81}}X\x08\0\0\0_modules{modules}sb"
    with pytest.raises(ModelFileError, match="sets attributes of a OrderedDict"):
        load_pickled(torch_zip(b"\x80\x02" + sequential.encode("latin1") + b"."), "m.pt")
    hidden = nn.Sequential()
    hidden._modules = OrderedDict()  # type: ignore[assignment]
    vars(hidden._modules)[method] = nn.ReLU()
    with pytest.raises(ModelFileError, match="`_modules` is an OrderedDict where every module holds a dict"):
        check_state(hidden, "m.pt")


def test_names_of_methods_are_not_looked_up_before_the_state_is_checked() -> None:
    model = nn.Sequential(nn.ReLU())
    vars(model)["modules"] = vars(model)["named_modules"] = nn.ReLU()  # would be called: it takes an argument
    with pytest.raises(ModelFileError, match=r"`(named_)?modules` is a ReLU that hides the one of Sequential"):
        load_pickled(torch_file(model), "m.pt")


def test_a_recurrent_layer_is_not_set_up_by_numbers_of_the_file() -> None:
    layer = nn.GRU(2, 2)
    assert load_pickled(torch_file(layer), "m.pt").num_layers == 1
    vars(layer).update(_all_weights=[[1]], num_layers=10**12)
    with pytest.raises(ModelFileError, match="does not list the names of its weights"):
        load_pickled(torch_file(layer), "m.pt")


def test_setters_of_configurations_are_not_reached() -> None:
    """The second part of a state is set attribute by attribute: `num_labels` makes a dict of as many labels."""
    state = b"N}X\x0a\0\0\0num_labelsJ\xff\xff\xff\x7fs\x86b."
    made = b"\x80\x02ctransformers.models.bert.configuration_bert\nBertConfig\n)\x81"
    with pytest.raises(ModelFileError, match="the state of a BertConfig is no dict"):
        load_pickled(torch_zip(made + state), "m.pt")


def test_a_member_of_an_enumeration_keeps_its_state() -> None:
    from timm.layers import Format

    member = b"\x80\x02ctimm.layers.format\nFormat\nX\x04\0\0\0NHWC\x85R"
    assert load_pickled(torch_zip(member + b"."), "m.pt") is Format.NHWC
    with pytest.raises(ModelFileError, match="Can only build"):
        load_pickled(torch_zip(member + b"}X\x06\0\0\0_name_X\x04\0\0\0evilsb."), "m.pt")
    assert Format.NHWC.name == "NHWC"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention_types", [[["global", "local"], 10**9]], "asks for attention_types = 1000000000"),
        ("attention_types", [[["global", "local"] * 300, 10**5]], "lists of more than"),
        ("hidden_size", 4_000, "they belong to another model"),
        ("max_position_embeddings", 10**9, "they belong to another model|too large"),
    ],
)
def test_a_configuration_that_asks_for_much_is_refused_before_it_is_built(key: str, value: Any, message: str) -> None:
    from transformers import GPTNeoConfig, GPTNeoModel

    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 32, "max_position_embeddings": 16}
    model = GPTNeoModel(
        GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2)
    )
    vars(model.config)[key] = value
    with pytest.raises(InputError, match=message):
        load_pickled(torch_file(model), "m.pt")
