"""Tasks of transformers models: which Auto classes build them and which outputs are theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repquant_fx.errors import InputError


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        auto_classes: of transformers; the first that knows a configuration builds it.
        outputs: the fields of the model's output that are wanted, where present; empty for every tensor at its top.
    """

    auto_classes: tuple[str, ...]
    outputs: tuple[str, ...] = ()


# A class may serve two tasks: the first that lists it is its own, so the most general comes last. A BART that writes
# serves masked-lm, too.
TASKS = {
    "image-classification": Task(("AutoModelForImageClassification",), ("logits",)),
    "text-classification": Task(("AutoModelForSequenceClassification",), ("logits",)),
    "seq2seq-lm": Task(("AutoModelForSeq2SeqLM",), ("logits",)),
    "speech-seq2seq": Task(("AutoModelForSpeechSeq2Seq",), ("logits",)),
    "masked-lm": Task(("AutoModelForMaskedLM",), ("logits",)),
    "causal-lm": Task(("AutoModelForCausalLM",), ("logits",)),
    "zero-shot-image-classification": Task(("AutoModelForZeroShotImageClassification",),
                                           ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")),
    "image-segmentation": Task(("AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation",
                                "AutoModelForInstanceSegmentation", "AutoModelForImageSegmentation"),
                               ("logits", "class_queries_logits", "masks_queries_logits", "pred_boxes", "pred_masks")),
    "object-detection": Task(("AutoModelForObjectDetection",), ("logits", "pred_boxes")),
    "zero-shot-object-detection": Task(("AutoModelForZeroShotObjectDetection",), ("logits", "pred_boxes")),
    "mask-generation": Task(("AutoModelForMaskGeneration",), ("iou_scores", "pred_masks")),
    "feature-extraction": Task(("AutoModel",)),
}
GENERAL = "feature-extraction"
WRITING = ("seq2seq-lm", "speech-seq2seq")  # of an encoder and a decoder


def check_task(task: str | None) -> None:
    """Raises:
        InputError: not a task; the message names them all.
    """
    if task is not None and task not in TASKS:
        raise InputError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")


def task_of(class_name: str) -> str:
    """The task of a model class of transformers, feature extraction where no other lists it."""
    return next((name for name, task in TASKS.items() if name != GENERAL and class_name in _class_names(task)), GENERAL)


def class_for(config: Any, task: str) -> Any:
    """The class of transformers that builds `config` for `task`: the one the configuration names where it is among
    them.

    Raises:
        InputError: unknown task, or none that fits the configuration; the message names those that do.
    """
    check_task(task)
    found = [
        cls for mapping in _mappings(TASKS[task]) if type(config) in mapping for cls in _as_tuple(mapping[type(config)])
    ]
    if not found:
        fitting = [
            name for name, other in TASKS.items() if any(type(config) in mapping for mapping in _mappings(other))
        ]
        raise InputError(
            f"a model of type {config.model_type!r} cannot do {task}; it can do: "
            f"{', '.join(fitting) or 'none of the tasks'}"
        )
    return next((cls for cls in found if cls.__name__ in (config.architectures or ())), found[0])


def _mappings(task: Task) -> list[Any]:
    import transformers

    return [getattr(transformers, name)._model_mapping for name in task.auto_classes]


def _class_names(task: Task) -> set[str]:
    return {
        name for mapping in _mappings(task) for entry in mapping._model_mapping.values() for name in _as_tuple(entry)
    }


def _as_tuple(entry: Any) -> tuple[Any, ...]:
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
