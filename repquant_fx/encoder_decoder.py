"""Compiling an encoder-decoder of transformers into two files, `encoder_model.onnx` and `decoder_model.onnx`.

    from repquant_fx.encoder_decoder import compile_halves
    compile_halves(Source("path/to/t5"), Calibration("text.txt")).save("out")
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repquant_fx import device as devices
from repquant_fx import log
from repquant_fx.calibration.batching import CalibrationSet
from repquant_fx.calibration.text import TEXT_SAMPLES
from repquant_fx.compiled import CompiledModel, superseded
from repquant_fx.compiler import compile_prepared
from repquant_fx.errors import InputError
from repquant_fx.files import DECODER, ENCODER, Content, check_directory, check_writable, is_directory, write_directory
from repquant_fx.frontends.encoder_decoder import TOKENS, halves
from repquant_fx.frontends.huggingface import writes
from repquant_fx.frontends.loading import LoadedModel
from repquant_fx.options import Calibration, Run, Source
from repquant_fx.preparation import load, prepare
from repquant_fx.recipe import Recipe, RecipeLike
from repquant_fx.targets import find


@dataclass(frozen=True)
class CompiledHalves:
    """The result of `compile_halves`.

    Attributes:
        encoder: takes what is read; gives `last_hidden_state`.
        decoder: takes `input_ids`, `encoder_hidden_states` and, of text, `encoder_attention_mask`; gives `logits` of
            every token. It keeps no cache.
    """

    encoder: CompiledModel
    decoder: CompiledModel

    @property
    def report(self) -> dict[str, Any]:
        """The report of each half."""
        return {"encoder": self.encoder.report, "decoder": self.decoder.report}

    def save(self, path: str | Path, *, force: bool = False, report: str | Path | None = None) -> Path:
        """Write both files into a directory, with what belongs beside them, and the report as JSON where a path is
        given. All of it or nothing.

        Raises:
            OutputError: a file exists and `force` is not set, or it cannot be written.
            InputError: the path names a file.
        """
        check_is_directory(path)
        folder = Path(path).resolve()
        models = {**self.encoder.content(ENCODER), **self.decoder.content(DECODER)}
        written = {} if report is None else {Path(report): (json.dumps(self.report, indent=2) + "\n").encode()}
        inside: dict[str, Content] = {p.name: d for p, d in written.items() if p.parent.resolve() == folder}
        files = {**self.encoder.companions, **inside, **models}
        check_directory(folder, files, force)
        outside = {check_writable(p, force): d for p, d in written.items() if p.name not in inside}
        old = [file for name in (ENCODER, DECODER) for file in superseded(folder / name, models)]
        write_directory(folder, files, outside, old)
        return folder


def is_encoder_decoder(source: Source) -> bool:
    """Whether `compile_halves` is for a source: a directory, or a model of the hub, that is to be compiled as a whole.

    Raises:
        ModelFileError, InputError: its configuration cannot be used.
    """
    return (source.module is None and isinstance(source.model, (str, Path))
            and writes(str(source.model), source.task, source.allow_pickle))


def check_is_directory(path: str | Path) -> None:
    """
    Raises:
        InputError: the path names a file.
    """
    if not is_directory(path):
        raise InputError(f"--out {path}: an encoder-decoder becomes two files; give a directory, a name that does not "
                         "end in .onnx")


def compile_halves(
    source: Source, calibration: Calibration, recipe: RecipeLike | None = None, run: Run | None = None, *,
    out: Path | None = None,
) -> CompiledHalves:
    """Quantize the encoder and the decoder of a model, each on what it will be given.

    The encoder is calibrated on the data. The decoder is calibrated on what the float model writes of the same data,
    token by token the likeliest, 64 at most (or `seq_len` where that is less), and on what the float encoder tells it.

    Args:
        source: of an encoder-decoder of transformers that generates.
        calibration: of what is read: text, or arrays; 128 samples where it does not say how many.
        recipe, run: as of `compiler.compile_model`.
        out: the directory that the result will be written to, where that is known.

    Raises:
        InputError, ParityError: as `compiler.compile_model` does; the model is no such encoder-decoder.
    """
    run = run or Run()
    log.start()
    devices.usable(run.device)
    if run.with_past:
        raise InputError("--with-past: the decoder of an encoder-decoder is written without a cache; leave it out")
    recipe = find(run.target, run.opset).recipe(Recipe.of(recipe))
    calibration = replace(calibration, samples=calibration.samples or TEXT_SAMPLES)
    log.stage("load")
    loaded = load(source)
    first, second = halves(loaded)
    encoder = prepare(replace(source, model=first), calibration, recipe, run, out)
    decoder = prepare(replace(source, model=second), calibration, recipe, run, out,
                      data=lambda: _written(loaded, encoder.data, calibration))
    compiled = []
    for name, prepared in (("encoder", encoder), ("decoder", decoder)):
        log.detail(f"the {name}:")
        compiled.append(compile_prepared(prepared, source, calibration, run))
        log.start()  # what the next one takes is its own
    return CompiledHalves(*compiled)


def _written(loaded: LoadedModel, data: CalibrationSet, calibration: Calibration) -> CalibrationSet:
    """The decoder's side of calibration data."""
    writer = loaded.writer
    assert writer is not None
    tokens = min(size for size in (TOKENS, calibration.seq_len, writer.longest) if size is not None)
    with loaded.guard:
        batches = [writer.half(batch, tokens) for batch in data.batches]
    origin = f"{data.origin}; what the float model writes of them, at most {tokens} tokens"
    return replace(data, batches=batches, origin=origin)
