"""A pass of Olive: a PyTorch or Hugging Face model in, a quantized ONNX model out.

Olive finds passes in a package configuration: `python -m repquant_fx.integrations.olive > packages.json` writes Olive's
own one with this pass in it, and `olive run --config run.json --package-config packages.json` uses it. In Python:
`olive.workflows.run(config, package_config=package_config())`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olive.common.config_utils import validate_config
from olive.data.config import DataConfig
from olive.model import HfModelHandler, ONNXModelHandler, PyTorchModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from repquant_fx.compiler import compile
from repquant_fx.errors import InputError
from repquant_fx.recipe import Recipe

_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "recipe": (str | dict | None, None, "A recipe file, or the settings of a recipe. RepQuant at W8A8 by default."),
    "wbits": (int | None, None, "Bits of weights, where the recipe shall have others."),
    "abits": (int | None, None, "Bits of activations, likewise."),
    "calibration": (str | None, None, "An image folder, or a file of arrays or text; where data_config is not given."),
    "data_config": (DataConfig | dict | None, None, "Calibration data of Olive."),
    "samples": (int | None, None, "Calibration samples: 128 of text and 1024 of anything else by default."),
    "batch_size": (int, 32, "Calibration samples at a time."),
    "seq_len": (int | None, None, "Tokens of a calibration sequence."),
    "seed": (int, 0, "Of every random choice."),
    "target": (str | None, None, "The runtime that the file is for; see repquant-fx targets."),
    "with_past": (bool, False, "The file of a causal language model decodes with a key/value cache."),
}
_OF_COMPILE = ("samples", "batch_size", "seq_len", "seed", "with_past")
_NAME = "RepQuant"


class RepQuant(Pass):  # type: ignore[misc]
    """Quantize by scale reparameterization, and export to ONNX QDQ."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        return {name: PassConfigParam(type_=kind, default_value=value, description=about)
                for name, (kind, value, about) in _OPTIONS.items()}

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        settings = config.model_dump()
        recipe = Recipe.of(settings["recipe"])
        bits = {name: settings[name] for name in ("wbits", "abits") if settings[name] is not None}
        if bits:
            recipe = Recipe.of({**recipe.to_dict(), **bits})
        options = {name: settings[name] for name in _OF_COMPILE}
        if settings["target"] is not None:
            options["target"] = settings["target"]
        source, given = self._source(model)
        compiled = compile(source, self._data(model, settings), recipe, **given, **options)
        path = compiled.save(resolve_onnx_path(output_model_path), force=True)
        beside = []
        for name, data in compiled.companions.items():
            (path.parent / name).write_bytes(data)
            beside.append(str(path.parent / name))
        report = path.parent / "report.json"
        report.write_text(compiled.report_json(), encoding="utf-8")
        return ONNXModelHandler(model_path=str(path), model_attributes={"additional_files": [*beside, str(report)]})

    @staticmethod
    def _source(model: Any) -> tuple[Any, dict[str, Any]]:
        """What `compile` takes of a model of Olive."""
        if isinstance(model, HfModelHandler):
            path = str(model.model_path)
            return (path if Path(path).is_dir() else model.load_model()), {}
        if not isinstance(model, PyTorchModelHandler):
            raise InputError(f"{_NAME} takes a PyTorch or Hugging Face model, not a {type(model).__name__}: put it "
                             "before passes that convert to ONNX")
        inputs = model.get_dummy_inputs()
        return model.load_model(), {} if inputs is None else {"example_inputs": inputs}

    @staticmethod
    def _data(model: Any, settings: dict[str, Any]) -> Any:
        if settings["data_config"] is None:
            return settings["calibration"]
        container = validate_config(settings["data_config"], DataConfig).to_data_container()
        return (_inputs(batch) for batch in container.create_dataloader())


def _inputs(batch: Any) -> Any:
    """Of an Olive batch, (inputs, labels), the inputs."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


def package_config() -> dict[str, Any]:
    """Olive's own package configuration, with this pass."""
    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    everything = ["*"]
    config["passes"][_NAME] = {
        "module_path": f"repquant_fx.integrations.olive.{_NAME}",
        "supported_providers": everything,
        "supported_accelerators": everything,
        "supported_precisions": ["int4", "int8", "uint4", "uint8"],
        "supported_algorithms": ["gptq"],
        "supported_quantization_encodings": ["qdq"],
        "dataset": "dataset_optional",
    }
    return config


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=2))
