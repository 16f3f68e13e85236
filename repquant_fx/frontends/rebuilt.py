"""A transformers model out of a pickle, built anew by its class from its configuration, with the tensors of the file.

So a pickled model can do no more than a directory with a `config.json` and safetensors. The configuration is made anew
as well, by its own constructor from plain data; no attribute of it may hide one of its class.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError, first_line
from repquant_fx.frontends.members import members_of
from repquant_fx.frontends.screening import REFUSED, is_dropped, screen
from repquant_fx.frontends.tables import check_tables
from repquant_fx.security.names import modules_in
from repquant_fx.torch_private import BUFFERS, PARAMETERS, children, put_child

Settle = Callable[[nn.Module, str], nn.Module]
_ATTENTION = ("sdpa", "eager")
_SKIPPED = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "name_or_path",
)  # of a configuration: what building does not need
# what a directory may not ask for either, and what the layers of a pickled model already are
_ELSEWHERE = (set(REFUSED) - {"attribute_map"}) | {
    "backbone",
    "model_args",
    "use_pretrained_backbone",
    "use_timm_backbone",
}
_ABOUT_TRAINING = ("training", "gradient_checkpointing", "name_or_path")
_DEEPEST, _MOST_ITEMS = 12, 1_000_000
_FEW = 1_000
_ADVICE = "Save it with save_pretrained or torch.export.save, or pass --allow-pickle if you trust the file"


def is_transformers_model(module: object) -> bool:
    """Whether a module is a model of transformers with a configuration; does not import the library."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(module, library.PreTrainedModel)


def rebuild(module: nn.Module, where: str, settle: Settle) -> nn.Module:
    """A model of the same class with the same tensors.

    Args:
        module: read from a file; nothing of it is run.
        where: the file and the path of the module, for the message.
        settle: gives what to keep of a layer of torch out of the file; takes the layer and its path.

    Raises:
        ModelFileError: its configuration is not plain data, or builds another model.
        InputError: it is too large.
    """
    config = vars(module).get("config")
    _check_configuration(type(module), config, where)
    counted = sum(1 for _ in modules_in(module, where))
    arguments, chosen = (
        _arguments(config, where, max(counted, _FEW), [0]),
        vars(config).get("_attn_implementation_internal"),
    )
    _check_amounts(module, arguments, where)
    problem: Exception | None = None
    for attention in dict.fromkeys([chosen, *_ATTENTION] if chosen in _ATTENTION else _ATTENTION):
        try:
            with limits.bounded_modules(where), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = _built(type(module), type(config), arguments, attention)
        except InputError:
            raise
        except Exception as error:
            problem = problem or error
            continue
        _transplant(made, module, where, "", settle)
        return made.train(module.training is True)
    raise ModelFileError(
        f"{where}: the configuration does not build a {type(module).__name__} ({first_line(problem or ValueError())}). "
        f"{_ADVICE}"
    ) from problem


def _check_amounts(module: nn.Module, arguments: dict[str, Any], where: str) -> None:
    """Refuse what the configuration asks for and the file does not have, before memory or time is taken.

    Raises:
        ModelFileError: lists or tables beyond measure.
        InputError: weights beyond those of the file, or beyond the memory.
    """
    described, place = _settings(arguments), f"{where}, configuration"
    screen(described, place)
    check_tables(type(module), described, place)
    skeleton = None
    try:
        with limits.rehearsal(where), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            skeleton = _built(type(module), type(vars(module)["config"]), arguments, "eager")
    except InputError:
        raise
    except Exception:  # some models need values; what else is wrong, building in earnest says
        pass
    slots = [vars(child)[slot] for child in modules_in(module, where) for slot in (PARAMETERS, BUFFERS)]
    held = [tensor for slot in slots for tensor in slot.values() if isinstance(tensor, Tensor)]
    limits.check_amount(skeleton, dict(enumerate(held)), f"{place} describes a {type(module).__name__}")


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as JSON would hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, _Nested):
            return _settings(value.parts[1])
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple, set)) else value

    return {key: plain(value) for key, value in arguments.items()}


def _built(cls: Any, config_cls: Any, arguments: dict[str, Any], attention: str) -> nn.Module:
    from transformers.initialization import no_init_weights

    from repquant_fx.frontends.offline import quiet_offline

    with quiet_offline(), no_init_weights():
        made: nn.Module = cls._from_config(
            _configuration(config_cls, arguments), dtype=torch.float32, attn_implementation=attention
        )
    return made


def _configuration(cls: Any, arguments: dict[str, Any]) -> Any:
    return cls(
        **{
            key: _configuration(*value.parts) if isinstance(value, _Nested) else value
            for key, value in arguments.items()
        }
    )


@dataclasses.dataclass(frozen=True)
class _Nested:
    """A configuration inside another: its class and its arguments."""

    parts: tuple[Any, dict[str, Any]]


def _check_configuration(cls: Any, config: object, where: str) -> None:
    wanted = getattr(cls, "config_class", None)
    if wanted is None or type(config) is not wanted:
        raise ModelFileError(
            f"{where}: the configuration of {cls.__name__} is a {type(config).__name__} instead of a "
            f"{getattr(wanted, '__name__', 'configuration of its own')}. {_ADVICE}"
        )
    if "timm" in cls.__module__:
        raise ModelFileError(
            f"{where} is a {cls.__name__}, which builds whatever its configuration names. Give the timm model itself, "
            "or pass --allow-pickle if you trust the file"
        )


def _arguments(config: Any, where: str, most_layers: int, count: list[int], depth: int = 0) -> dict[str, Any]:
    """The attributes of a configuration as arguments of its constructor."""
    if depth > _DEEPEST:
        raise ModelFileError(f"{where} has a configuration inside itself")
    cls = type(config)
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        place = f"{where}, configuration"
        if not isinstance(key, str) or not key.isidentifier():
            _refuse(place, key, "is no name of an attribute")
        hidden = inspect.getattr_static(cls, key, None)
        if (
            hidden is not None
            and key not in fields
            and (callable(hidden) or not isinstance(hidden, (bool, int, float, str, tuple)) or key == "model_type")
            and not _same(value, hidden)
        ):
            _refuse(place, key, f"hides the one of {cls.__name__}")
        if key in _ELSEWHERE and value:
            _refuse(place, key, f"is {value!a:.60}: it asks for code or weights from elsewhere")
        if key.startswith("_") or key in _SKIPPED or (hidden is not None and key not in fields):
            continue
        if is_dropped(key, value):
            continue
        if isinstance(value, int) and value > most_layers and re.fullmatch(r"num_labels|\w*layers?|depths?", key):
            _refuse(place, key, f"is {str(value)[:40]}, and the file has fewer layers")
        found[key] = _plain(value, f"{place}: `{key}`", most_layers, count, depth)
    return found


def _same(value: object, other: object) -> bool:
    return value is other or (
        type(value) is type(other) and isinstance(value, (dict, list, tuple, set, str)) and value == other
    )


def _plain(value: Any, where: str, most_layers: int, count: list[int], depth: int) -> Any:
    """A copy of plain data, configurations in it as `_Nested`."""
    count[0] += 1
    if depth > _DEEPEST or count[0] > _MOST_ITEMS:
        raise ModelFileError(f"{where} nests beyond measure")
    if value is None or type(value) in (bool, int, float, str):
        if isinstance(value, int) and value.bit_length() > 64:
            raise ModelFileError(f"{where} is an integer of {value.bit_length()} bits")
        return value
    if type(value) in (list, tuple, set):
        return type(value)(_plain(item, where, most_layers, count, depth + 1) for item in value)
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return {key: _plain(item, where, most_layers, count, depth + 1) for key, item in value.items()}
    if type(value) in (torch.dtype,):
        return str(value).removeprefix("torch.")
    if type(value).__module__.startswith("transformers.models.") and hasattr(type(value), "model_type"):
        return _Nested((type(value), _arguments(value, where, most_layers, count, depth + 1)))
    raise ModelFileError(f"{where} is a {type(value).__name__} where a configuration holds plain data. {_ADVICE}")


def _transplant(made: nn.Module, old: nn.Module, where: str, path: str, settle: Settle) -> None:
    """Put the tensors of one model into another, which must have the same layers.

    A layer of torch (it may have another epsilon, or be a head for other classes) is kept as the file has it, once it
    is settled and has nothing but the attributes of its class.
    """
    if type(made) is not type(old):
        _misfit(where, path, f"is a {type(old).__name__} where the configuration makes a {type(made).__name__}")
    new_state, old_state = vars(made), vars(old)
    for slot, kind in ((PARAMETERS, nn.Parameter), (BUFFERS, Tensor)):
        new, given = new_state[slot], old_state[slot]
        if names := sorted(set(_present(new)) ^ set(_present(given))):
            _misfit(where, path, f"differs in {', '.join(names[:4])}")
        for name in _present(given):
            if not isinstance(given[name], kind) or type(given[name]) not in (Tensor, nn.Parameter):
                _misfit(where, path, f"has a {type(given[name]).__name__} called {name} where a tensor belongs")
            if given[name].shape != new[name].shape:
                _misfit(
                    where,
                    path,
                    f"has {name} of shape {list(given[name].shape)} where the configuration makes "
                    f"{list(new[name].shape)}",
                )
            vars(given[name]).clear()
            new[name] = given[name]
    if changed := next((key for key, value in old_state.items() if _is_changed(key, value, new_state)), None):
        _misfit(
            where,
            path,
            f"has {changed} = {old_state[changed]!a:.40} where the configuration makes {new_state[changed]!a:.40}",
        )
    if names := sorted(set(children(made)) ^ set(children(old))):
        _misfit(where, path, f"differs in its layers {', '.join(names[:4])}")
    for name, child in children(old).items():
        inner = f"{path}.{name}".strip(".")
        before = children(made)[name]
        if type(child).__module__.startswith("torch.nn.modules.") and not children(child):
            put_child(made, name, settle(child, inner))
            cls: type = type(child)
            known = {*vars(nn.Module()), *members_of(cls).kinds}
            for key in [key for key in vars(child) if key not in known]:
                del vars(child)[key]
        else:
            _transplant(before, child, where, inner, settle)


def _present(slot: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in slot.items() if value is not None}


def _is_changed(key: str, value: object, state: dict[str, Any]) -> bool:
    if key.startswith("_") or key in _ABOUT_TRAINING or key not in state:
        return False
    return (
        isinstance(value, (bool, int, float, str))
        and isinstance(state[key], (bool, int, float, str))
        and value != state[key]
    )


def _misfit(where: str, path: str, problem: str) -> NoReturn:
    raise ModelFileError(f"{where}: {path or 'the model'} {problem}. {_ADVICE}")


def _refuse(where: str, key: object, problem: str) -> NoReturn:
    raise ModelFileError(f"{where}: {ascii(key)[:80]} {problem}. {_ADVICE}")
