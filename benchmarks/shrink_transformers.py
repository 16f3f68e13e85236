"""Models of transformers at a small size (see `shrink`)."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from made_up import inputs_of
from shrink import WIDTH, NotSmall, built, check_runs, said
from small_configurations import smaller
from torch import Tensor, nn


def architectures_of_transformers() -> dict[str, str]:
    """Types of models that have a general class, and the folder that their code is in."""
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    mapping = transformers.AutoModel._model_mapping
    return {kind: model_type_to_module_name(kind) for kind in mapping._model_mapping if kind in mapping._config_mapping}


def small_transformers(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, weights drawn anew, and inputs by name, two of each.

    Raises:
        NotSmall: see there.
    """
    import transformers

    mapping, whys = transformers.AutoModel._model_mapping, []
    config_class: Any = transformers.CONFIG_MAPPING[kind]
    for width, filled, dropped in itertools.product(_WIDTHS, (False, True), ((), ("layer_types",), _STAGES)):
        try:
            config = config_class.from_dict(smaller(config_class().to_dict(), width, filled, dropped))
            if hasattr(config, "use_cache"):
                config.use_cache = False
            found = mapping[type(config)]
            cls = found[0] if isinstance(found, (tuple, list)) else found
            torch.manual_seed(0)
            model = built(lambda: cls(config))  # noqa: B023
            return model, _first_that_runs(model, config)
        except Exception as error:
            whys.append(str(error) if isinstance(error, NotSmall) else said(error))
            if isinstance(error, ImportError):
                break
    raise NotSmall(whys[0])


_WIDTHS = (WIDTH, 6 * WIDTH, 10**6)  # some need heads of 64, or more parts; and some, the widths that they have
_STAGES = ("layer_types", "out_features", "_out_features", "out_indices", "_out_indices", "stage_names")


def _first_that_runs(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Inputs that the model runs on.

    Raises:
        NotSmall: it runs on none.
    """
    takes, whys = inspect.signature(model.forward).parameters, {}
    for inputs in inputs_of(config, takes):
        try:
            check_runs(model, inputs)
            return inputs
        except Exception as error:
            whys.setdefault(len(inputs), said(error))  # what most inputs fail by is the likeliest reason
    needed = [name for name, each in takes.items() if each.default is inspect.Parameter.empty
              and each.kind is each.POSITIONAL_OR_KEYWORD]
    needed = needed or list(takes)[:1]
    raise NotSmall(whys[max(whys)] if whys else f"its input is {', '.join(needed)}, which is not made up here")
