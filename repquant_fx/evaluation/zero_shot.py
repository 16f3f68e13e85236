"""Zero-shot classification: a model of texts and images, class prompts, and a folder of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from repquant_fx.calibration.images import image_size
from repquant_fx.calibration.text import check_text_size
from repquant_fx.errors import InputError
from repquant_fx.evaluation.classification import Accuracy, accuracy_of, image_preprocessing, labelled_folder
from repquant_fx.evaluation.runners import Runner, first_rows
from repquant_fx.evaluation.text import (
    check_vocabulary,
    fixed_length,
    ids_name,
    padded,
    sequence_length,
    text_inputs,
    tokenize,
    tokenizer_for,
    tokenizer_limit,
)
from repquant_fx.files import irregular
from repquant_fx.progress import progress

_SLOT = "{}"
_EMBEDDINGS = ("image_embeds", "text_embeds")


def zero_shot(
    runner: Runner,
    data: Path,
    *,
    prompts: str,
    tokenizer: str | None = None,
    seq_len: int | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    seed: int = 0,
) -> Accuracy:
    """Accuracy of a model that compares texts and images. Long because it says what every argument is.

    A class with several prompts is the normalized mean of their normalized text embeddings; where the model gives no
    embeddings, the mean of its `logits_per_image`.

    Args:
        data: folders of images, each named by its class.
        prompts: see `read_prompts`.
        tokenizer: directory; the model's own where None.
        seq_len: longer prompts are cut; as long as the model takes where None.
        batch_size: images, and prompts, at a time.
        limit: a random subset of this many images.
        seed: of the subset.

    Raises:
        InputError: model, tokenizer, prompts and data do not fit.
    """
    images = _image_input(runner)
    spec = runner.input(images)
    assert spec is not None
    size = image_size(spec.shape, runner.preprocessing)
    labelled = labelled_folder(
        data, image_preprocessing(runner), size, runner.limit(images, batch_size), limit, seed, dtype=spec.dtype
    )
    classes = read_prompts(prompts, labelled.classes)
    place = {name: i for i, name in enumerate(classes)}
    labelled.files = [(path, place[labelled.classes[label]]) for path, label in labelled.files]
    texts = _Texts(runner, [text for group in classes.values() for text in group], tokenizer, seq_len, batch_size)
    owners = torch.tensor([i for i, group in enumerate(classes.values()) for _ in group])
    blank = torch.zeros(1, *size, dtype=spec.dtype)
    outputs = runner({images: blank, **texts.batches[0]})
    if all(name in outputs for name in _EMBEDDINGS):
        found = [
            first_rows(runner({images: blank, **batch})["text_embeds"], len(next(iter(batch.values()))))
            for batch in texts.batches
        ]
        weights = _unit(_class_means(_unit(torch.cat(found).double()), owners, len(classes)))

        def predict(batch: Tensor) -> Tensor:
            embeddings = first_rows(runner({images: batch, **texts.batches[0]})["image_embeds"], len(batch))
            return _unit(embeddings.double()) @ weights.T
    elif "logits_per_image" in outputs:
        def predict(batch: Tensor) -> Tensor:
            parts = [
                runner({images: batch, **part})["logits_per_image"][: len(batch), : len(next(iter(part.values())))]
                for part in texts.batches
            ]
            return _class_means(torch.cat(parts, 1).T.double(), owners, len(classes)).T
    else:
        raise InputError(
            f"zero-shot needs the outputs image_embeds and text_embeds, or logits_per_image; {runner.source} gives "
            f"{', '.join(outputs) or 'no tensor'}"
        )
    return accuracy_of(predict, progress(labelled, len(labelled), "evaluating"))


def read_prompts(prompts: str, folders: Sequence[str]) -> dict[str, list[str]]:
    """The prompts of each class.

    Args:
        prompts: a template with `{}` for the name of a folder (underscores become spaces); or a JSON file, an object
            from class names to a prompt or a list of prompts. Classes of the file that have no folder compete as well.
        folders: the names of the image folders.

    Raises:
        InputError: neither, malformed, or a folder without prompts.
    """
    if _SLOT in prompts:
        return {name: [prompts.replace(_SLOT, name.replace("_", " "))] for name in folders}
    path = Path(prompts).expanduser()
    if kind := irregular(path):
        raise InputError(f"--prompts {prompts} is {kind}, not a file")
    check_text_size(path, "prompts")
    try:
        stored = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(
            f"--prompts {prompts} is neither a template with {{}} nor a file that can be read: {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"prompts {path}: not valid JSON: {error}") from error
    found = (
        {name: [texts] if isinstance(texts, str) else texts for name, texts in stored.items()}
        if isinstance(stored, dict)
        else {}
    )
    if not found or not all(
        isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts) for texts in found.values()
    ):
        raise InputError(
            f'prompts {path}: expected an object from class folders to lists of prompts, such as {{"cat": ["a photo of '
            f'a cat"]}}'
        )
    missing = [name for name in folders if name not in found]
    if missing:
        raise InputError(f"prompts {path} has none for the class folders {', '.join(missing[:8])}")
    return found


class _Texts:
    """Tokenized prompts as batches of text inputs."""

    def __init__(
        self, runner: Runner, prompts: Sequence[str], tokenizer: str | None, seq_len: int | None, batch_size: int
    ) -> None:
        reader = tokenizer_for(runner, tokenizer)
        length, fixed = sequence_length(runner, reader, seq_len), fixed_length(runner)
        rows = tokenize(reader, prompts, truncation=True, max_length=length)
        check_vocabulary(runner, rows)
        unmasked = "attention_mask" not in getattr(reader, "model_input_names", ["attention_mask"])
        if unmasked and fixed is None and tokenizer_limit(reader) is not None:
            fixed = length  # a model trained without a mask reads the filling, and wants all of it
        filler = reader.pad_token_id if reader.pad_token_id is not None else reader.eos_token_id
        ids, mask = padded(rows, fixed, filler)
        if unmasked:
            mask = torch.ones_like(mask)
        size = runner.limit(ids_name(runner), batch_size)
        self.batches: list[dict[str, Tensor]] = [
            text_inputs(runner, ids[i : i + size], mask[i : i + size]) for i in range(0, len(ids), size)
        ]


def _image_input(runner: Runner) -> str:
    names = [spec.name for spec in runner.inputs if len(spec.shape) == 4 and spec.dtype.is_floating_point]
    if len(names) != 1:
        raise InputError(
            "zero-shot needs a model of texts and images, with inputs such as input_ids and pixel_values; "
            f"{runner.source} takes "
            f"{', '.join(spec.name for spec in runner.inputs)}"
        )
    return names[0]


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)


def _class_means(rows: Tensor, owners: Tensor, classes: int) -> Tensor:
    """Means of the rows of each class: (rows, width) and (rows,) to (classes, width)."""
    sums = torch.zeros(classes, rows.shape[1], dtype=rows.dtype).index_add_(0, owners, rows)
    return sums / torch.bincount(owners, minlength=classes)[:, None]

