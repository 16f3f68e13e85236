"""What a description in a model directory may say: settings. Not code, not other files, not numbers that no model has.

Descriptions go to transformers, which follows many of their entries: to classes in other files, to kernels of the
hub, to checkpoints anywhere. Such entries are refused by name, or left out where sound directories carry them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from repquant_fx.errors import ModelFileError
from repquant_fx.frontends.architectures import FORBIDDEN

REFUSED = {
    "auto_map": "asks for code of its own ({entry}), which is never run. If a class of transformers itself is meant, "
    "remove auto_map; else save the model with torch.export.save",
    "custom_generate": "asks for code of its own ({entry}), which is never run",
    "configuration_files": "names further configurations ({entry}); only config.json is read: remove the entry",
    "transformers_weights": "names the file of its weights ({entry}); call it model.safetensors and remove the entry",
    "quantization_config": "has a quantization_config: the weights are already quantized; give the float model",
    "compression_config": "has a compression_config: the weights are already quantized; give the full-precision model",
    **dict.fromkeys(
        ("use_kernels", "_use_kernels", "kernel_config", "fusion_config"),
        "asks for kernels of the hub ({entry}); remove the entry",
    ),
    **dict.fromkeys(
        ("checkpoint_path", "gguf_file", "model_file", "model_proto"),
        "names another file ({entry}), which is not read: remove the entry",
    ),
    "attribute_map": "renames the entries of the configuration ({entry}), which only its class may",
}
# Entries about where files once lay; transformers finds them by itself.
_DROPPED = re.compile(r"\w+_files?|(_commit|_?name_or)_(hash|path)|(source|target)_spm")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "grouped_mm",
    "batched_mm",
)
_OPTIONS_OF_TIMM = ("model_args", "backbone_kwargs")
_TIMM_NAMES = ("architecture", "backbone")
_DTYPE = re.compile(r"auto|(torch\.)?(float|bfloat|half|double|u?int)\w{0,12}")
_DEEPEST = 40

_LAYERS = re.compile(r"\w*(layers?|depths?|blocks|stages|repeats|bottlenecks|n_deep)(_per_\w+)?")
_LARGE = re.compile(
    r"\w*(theta|base|position|length|_len|window|vocab|seq|ctx|size|dim|_id|ids|token|seed|freq|rate|pixels|param|"
    r"flo|max|min|"
    r"channels|chans|features|width|height|samples)\w*"
)
_MOST_LAYERS, _MOST_OTHERS, _MOST_LARGE = 10_000, 1_000_000, 1 << 62
_MOST_REPEATED = 1_000_000  # entries of all the lists that a configuration asks for


def screen(value: Any, where: str) -> Any:
    """A description without the entries that mean nothing here.

    Args:
        value: of JSON.
        where: its file, for messages.

    Raises:
        ModelFileError: it names code or other files, or sizes that no model has.
    """
    methods = _methods()
    check_numbers(value, where)

    def clean(item: Any, key: str, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ModelFileError(f"{where} is nested more than {_DEEPEST} levels deep")
        if isinstance(item, list):
            return [clean(each, key, depth + 1) for each in item]
        if not isinstance(item, dict):
            return item
        _check_entries(
            item, key, where, methods if not depth or "model_type" in item or key.endswith("_config") else frozenset()
        )
        return {name: clean(each, name, depth + 1) for name, each in item.items() if not is_dropped(name, each)}

    return clean(value, "", 0)


def is_dropped(name: str, value: Any) -> bool:
    """Whether an entry means nothing here: where files once lay, how attention was computed."""
    return bool(
        (isinstance(value, (str, list, type(None))) and _DROPPED.fullmatch(name))
        or (name in ("vocab", "merges") and isinstance(value, str))
        or _IMPLEMENTATION.fullmatch(name)
    )


def _check_entries(entries: dict[str, Any], inside: str, where: str, methods: frozenset[str]) -> None:
    for name, value in entries.items():
        entry = f"{name}: {str(value)[:100]}"
        if name in REFUSED and value:
            raise ModelFileError(f"{where} {REFUSED[name].format(entry=entry)}")
        if name in methods or name.startswith("__"):
            raise ModelFileError(f"{where} has an entry {name!r}, which is no setting; remove it")
        if _IMPLEMENTATION.fullmatch(name) and not all(
            each is None or isinstance(each, bool) or each in _IMPLEMENTATIONS for each in _values(value)
        ):
            raise ModelFileError(f"{where} asks for kernels of the hub ({entry}); remove the entry")
        if name in ("dtype", "torch_dtype") and isinstance(value, str) and not _DTYPE.fullmatch(value):
            raise ModelFileError(f"{where} has the dtype {value[:100]!r}, which there is not")
        if inside in _OPTIONS_OF_TIMM and value and (name in FORBIDDEN or name.startswith("pretrained")):
            raise ModelFileError(f"{where} names another file ({inside}: {entry}), which is not read: remove the entry")
        if name in _TIMM_NAMES and isinstance(value, str) and not re.fullmatch(r"[\w.\-]+", value):
            raise ModelFileError(
                f"{where} names another model ({entry}), which is not read; give its configuration as {name}_config"
            )


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    else:
        yield value


def _methods() -> frozenset[str]:
    """Names of the methods of configurations, which an entry of the same name would hide."""
    from transformers import PretrainedConfig

    return frozenset(name for name, _ in inspect.getmembers(PretrainedConfig, inspect.isroutine))


def check_numbers(value: Any, where: str) -> None:
    """Refuse sizes that no model has: a configuration makes lists of the lengths that it names before there is a model
    to measure.

    Raises:
        ModelFileError: one is that large, or all lists together are.
    """
    repeated = 0

    def repeats(count: int, entry: str) -> None:
        nonlocal repeated
        repeated += max(count, 0)
        if repeated > _MOST_REPEATED:
            raise ModelFileError(f"{where} asks for {entry}: lists of more than {_MOST_REPEATED} entries in all")

    def check(item: Any, key: str, beside: int) -> None:
        """`beside`: entries of a list that stands beside an integer in another list, for the integer to repeat."""
        if isinstance(item, dict):
            for name, each in item.items():
                check(each, name, 0)
        elif isinstance(item, list):
            lengths = sum(len(each) for each in item if isinstance(each, list))
            for each in item:
                check(each, key, lengths)
        elif isinstance(item, int) and not isinstance(item, bool):
            entry = f"{key} = {str(item)[:40]}" if abs(item) < 10**40 else f"{key} of more than 40 digits"
            layers = _LAYERS.fullmatch(key)
            most = _MOST_LAYERS if layers else _MOST_LARGE if _LARGE.fullmatch(key) else _MOST_OTHERS
            if abs(item) > most and key != "model_max_length":
                raise ModelFileError(f"{where} asks for {entry}")
            if layers or beside:
                repeats(item * max(beside, 1), entry)

    try:
        check(value, "", 0)
    except RecursionError as error:
        raise ModelFileError(f"{where} is nested too deep") from error
