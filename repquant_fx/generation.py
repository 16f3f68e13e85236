"""Text from a causal language model, token by token through its key/value cache; or from an encoder and a decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repquant_fx.errors import InputError
from repquant_fx.evaluation.decoder import Decoder
from repquant_fx.evaluation.runners import Runner, open_runner, proto_runner
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.exporters.dynamic_shapes import dynamic_shapes
from repquant_fx.exporters.onnx_qdq import export_onnx
from repquant_fx.files import DECODER, ENCODER, MODEL
from repquant_fx.frontends.directory import CONFIG, find_files
from repquant_fx.frontends.encoder_decoder import HIDDEN, HIDDEN_MASK, READ, WRITTEN
from repquant_fx.frontends.past import is_cache, output_name
from repquant_fx.options import Source
from repquant_fx.passes.base import run_pass
from repquant_fx.passes.store_caches import StoreCaches
from repquant_fx.preparation import match

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Generated:
    """Tokens that followed a prompt, and the time they took.

    Attributes:
        tokens: without the prompt; a token that ends the text is the last.
        prompt_seconds: until the logits of the prompt were there.
        seconds: for all tokens after the first.
    """

    tokens: list[int]
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the prompt left out; 0 where one token alone was made."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Halves:
    """The two files of an encoder-decoder.

    Attributes:
        start: the token that every text begins with.
        ends: tokens after which nothing follows.
    """

    encoder: Runner
    decoder: Runner
    start: int
    ends: tuple[int, ...]


def generate(runner: Runner | Halves, prompt: list[int], tokens: int, *, temperature: float = 0.0, seed: int = 0,
             ends: Collection[int] = ()) -> Generated:
    """Continue a prompt token by token, or write what an encoder-decoder makes of it.

    Args:
        prompt: ids, at least one.
        tokens: how many at most.
        temperature: 0 takes the likeliest token; else one is drawn from the distribution of logits divided by it.
        seed: of what is drawn.
        ends: tokens after which nothing follows.

    Raises:
        InputError: the model has no cache or does not run on the prompt, which may be empty; or its logits are not
            finite.
    """
    if not prompt:
        raise InputError("the prompt has no token")
    choose, found, seconds = _chooser(temperature, seed), list[int](), list[float]()
    steps = _written(runner, prompt, found) if isinstance(runner, Halves) else _steps(Decoder(runner), prompt, found)
    source = (runner.decoder if isinstance(runner, Halves) else runner).source
    for logits, spent in _timed(steps):
        if not bool(torch.isfinite(logits).all()):
            raise InputError(f"the logits of {source} are NaN or infinite after {len(found)} tokens")
        found.append(choose(logits))
        seconds.append(spent)
        if len(found) == tokens or found[-1] in ends:
            break
    return Generated(found, seconds[0], sum(seconds[1:]))


def _steps(decoder: Decoder, prompt: list[int], found: list[int]) -> Iterator[Tensor]:
    """The logits of the prompt's last token, then of each token that is found."""
    given = prompt
    while True:
        yield decoder(torch.tensor([given]))[0, -1]
        given = found[-1:]


def _written(halves: Halves, prompt: list[int], found: list[int]) -> Iterator[Tensor]:
    """The logits of the first token that an encoder-decoder writes of a prompt, then of each that follows what is
    found. It keeps no cache: each step decodes all tokens again."""
    ids = torch.tensor([prompt])
    read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if any(halves.encoder.input(name) is None for name in read):
        raise InputError(f"{halves.encoder.source} does not read text; generate is for models that do")
    told = {HIDDEN: halves.encoder(read)[READ], HIDDEN_MASK: read["attention_mask"]}
    while True:
        yield halves.decoder({"input_ids": torch.tensor([[halves.start, *found]]), **told})[WRITTEN][0, -1]


def _timed(steps: Iterator[Tensor]) -> Iterator[tuple[Tensor, float]]:
    """What each step gives, and the seconds that it took."""
    while True:
        start = time.perf_counter()
        logits = next(steps)
        yield logits, time.perf_counter() - start


def _chooser(temperature: float, seed: int) -> Callable[[Tensor], int]:
    generator = torch.Generator().manual_seed(seed)
    if not temperature:
        return lambda logits: int(logits.argmax())
    return lambda logits: int(torch.multinomial((logits.double() / temperature).softmax(0), 1, generator=generator))


def exported_runner(model: str | Path, threads: int | None = None) -> Runner:
    """A file that `compile` wrote, or its directory, under ONNX Runtime.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    path = Path(model) / MODEL if Path(model).is_dir() else Path(model)
    if path.suffix.lower() != ".onnx" or not path.is_file():
        raise InputError(f"{model} is no exported model: give an .onnx, or a directory with {MODEL}")
    return open_runner(Source(str(path)), threads)


def exported_halves(model: str | Path, threads: int | None = None) -> Halves | None:
    """The encoder and the decoder that `compile` wrote into a directory, under ONNX Runtime; None of anything else.

    Raises:
        InputError: a file cannot be read, or nothing beside them says which token a text begins with.
    """
    folder = Path(model)
    if not all((folder / name).is_file() for name in (ENCODER, DECODER)):
        return None
    files, names = find_files(folder), (_GENERATION, CONFIG)
    described = [each for name in names if files.has(name) and isinstance(each := files.json(name), dict)]
    start = next((each[key] for key in ("decoder_start_token_id", "bos_token_id") for each in described
                  if isinstance(each.get(key), int)), None)
    if start is None:
        raise InputError(f"no {' or '.join(names)} in {folder} says with which token a text begins "
                         "(decoder_start_token_id)")
    ends = next((each["eos_token_id"] for each in described if each.get("eos_token_id") is not None), ())
    ends = tuple(end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int))
    encoder, decoder = (open_runner(Source(str(folder / name)), threads) for name in (ENCODER, DECODER))
    return Halves(encoder, decoder, start, ends)


def float_runner(source: Source, threads: int | None = None) -> Runner:
    """The float model of a source under ONNX Runtime: what an exported file is compared with.

    Raises:
        InputError: as `float_model` does.
    """
    return proto_runner(float_model(source), f"the float model of {source.model}", threads)


def float_model(source: Source) -> OnnxModel:
    """The float model of a source as ONNX, with a float cache.

    Raises:
        InputError: it cannot be loaded or captured, or it keeps no cache.
    """
    matched = match(source, with_past=True)
    graph_module, captured = matched.graph_module, matched.captured
    run_pass(graph_module, StoreCaches({}, codes=False))
    graph_module.recompile()  # passes leave that to the first call
    presents = [output_name(name) for name in captured.input_names if is_cache(name)]
    return export_onnx(graph_module, matched.loaded.example_inputs, input_names=captured.input_names,
                       output_names=[*captured.output_names, *presents], dynamic_shapes=dynamic_shapes(graph_module))
