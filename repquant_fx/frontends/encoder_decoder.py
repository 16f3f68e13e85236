"""Encoder-decoders of transformers: one half reads a text, sounds or an image; the other writes, token by token, what
the first makes it write.

A model as a whole takes both: what is read, and `decoder_input_ids`, which no data has. They are written by the model
itself, the likeliest token at each step. For deployment the halves are models of their own, with the names that optimum
looks for: the encoder gives `last_hidden_state`, the decoder takes `input_ids`, `encoder_hidden_states` and, of what
has a mask, `encoder_attention_mask`. Nothing is known of a model but that its configuration says what it is and that it
can generate.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from repquant_fx.errors import InputError, first_line
from repquant_fx.frontends.past import cache_parameter
from repquant_fx.frontends.signature import TARGET, longest_target, target_vocabulary
from repquant_fx.frontends.tasks import GENERAL

if TYPE_CHECKING:
    from repquant_fx.frontends.loading import LoadedModel

HIDDEN, HIDDEN_MASK = "encoder_hidden_states", "encoder_attention_mask"  # of the decoder
READ, WRITTEN = "last_hidden_state", "logits"  # what the halves give
TOKENS = 64  # that are written of a calibration sample at most
_MASK = "attention_mask"


@dataclass(frozen=True)
class Writer:
    """How a model writes.

    Attributes:
        start: the token that every text begins with.
        ends: tokens after which nothing follows.
        longest: tokens that the decoder was built for; None where there is no limit.
    """

    module: nn.Module
    names: tuple[str, ...]
    start: int
    ends: tuple[int, ...]
    longest: int | None

    @property
    def given(self) -> int:
        """Inputs of the whole that the others follow from."""
        return len(self.names)

    @torch.no_grad()
    def read(self, batch: Sequence[Tensor]) -> Tensor:
        """What the encoder makes of the inputs that are read, shape (batch, positions, width).

        Raises:
            InputError: it does not run on them.
        """
        with _said("the encoder", batch):
            return cast(Tensor, cast(Any, self.module).get_encoder()(**dict(zip(self.names, batch)))[READ])

    @torch.no_grad()
    def write(self, batch: Sequence[Tensor], hidden: Tensor, tokens: int = TOKENS) -> Tensor:
        """Ids (batch, at most `tokens`), int64: `start`, and the likeliest token at each step. What follows an end
        token is that token again.

        Raises:
            InputError: the model does not run on the inputs, or gives what is not finite.
        """
        ids = torch.full((len(hidden), 1), self.start, dtype=torch.int64)
        done, cache, name = torch.zeros(len(hidden), dtype=torch.bool), None, cache_parameter(self.module)
        with _said("the decoder", batch):
            for _ in range(min(tokens, self.longest or tokens) - 1):
                given = {TARGET: ids if cache is None else ids[:, -1:], name: cache}
                result = self.module(**_told(hidden, self.mask(batch)), **given, use_cache=True)
                cache, logits = result.get(name), result[WRITTEN][:, -1]
                if not bool(torch.isfinite(logits).all()):
                    raise InputError("the logits of the decoder are NaN or infinite")
                likeliest = torch.where(done, ids[:, -1], logits.argmax(-1))
                done = done | torch.isin(likeliest, torch.tensor(self.ends, dtype=torch.int64))
                ids = torch.cat([ids, likeliest[:, None]], 1)
                if bool(done.all()):
                    break
        return ids

    def complete(self, batch: Sequence[Tensor], tokens: int = TOKENS) -> tuple[Tensor, ...]:
        """All inputs of the whole."""
        return (*batch, self._padded(self.write(batch, self.read(batch), tokens), tokens))

    def half(self, batch: Sequence[Tensor], tokens: int = TOKENS) -> tuple[Tensor, ...]:
        """All inputs of the decoder."""
        hidden = self.read(batch)
        ids, mask = self._padded(self.write(batch, hidden, tokens), tokens), self.mask(batch)
        return (ids, *([] if mask is None else [mask]), hidden)

    def mask(self, batch: Sequence[Tensor]) -> Tensor | None:
        """Which positions of what the encoder gives are real; None where all are, or it counts them otherwise."""
        given = dict(zip(self.names, batch))
        return given[_MASK] if self.names[:2] == ("input_ids", _MASK) else None

    def _padded(self, ids: Tensor, tokens: int) -> Tensor:
        """All batches of one length."""
        missing = min(tokens, self.longest or tokens) - ids.shape[1]
        return torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1)


def writer_of(module: nn.Module, names: Sequence[str]) -> Writer | None:
    """How a model writes, of which the whole takes inputs called `names`; None of one that does not.

    Raises:
        InputError: it does not say which token comes first.
    """
    if TARGET not in names:
        return None
    config: Any = cast(Any, module).config
    described = [getattr(module, "generation_config", None), config, getattr(config, "decoder", None)]
    start = next((token for name in ("decoder_start_token_id", "bos_token_id") for each in described
                  if isinstance(token := getattr(each, name, None), int)), None)
    if start is None or not 0 <= start < target_vocabulary(config):
        raise InputError(f"the configuration of {type(module).__name__} names no decoder_start_token_id, with which a "
                         "decoder begins")
    ends = next((end for each in described if (end := getattr(each, "eos_token_id", None)) is not None), ())
    ends = tuple(end for end in (ends if isinstance(ends, (list, tuple)) else [ends]) if isinstance(end, int))
    return Writer(module, tuple(name for name in names if name != TARGET), start, ends, longest_target(config))


def halves(loaded: LoadedModel) -> tuple[LoadedModel, LoadedModel]:
    """The encoder and the decoder of a model as models of their own; layers are called as in the whole.

    Raises:
        InputError: it is none, or its encoder does not run on the example inputs.
    """
    writer, names, axes = loaded.writer, loaded.input_names, loaded.dynamic_axes
    if writer is None or names is None or axes is None:
        raise InputError(f"{loaded.source} is no encoder-decoder of transformers that generates")
    by_name = dict(zip(names, loaded.example_inputs))
    ids = by_name.pop(TARGET)
    read, free = tuple(by_name), dict(zip(names, axes))
    paths = tuple(name for name, _ in writer.module.named_modules())
    encoder = replace(
        loaded, module=_with_forward(writer.module, _encode, read), source=f"the encoder of {loaded.source}",
        input_names=read, example_inputs=tuple(by_name.values()), dynamic_axes=tuple(free[name] for name in read),
        outputs=(READ,), task=GENERAL, writer=None, other_layers=paths)
    with loaded.guard:
        hidden, mask = writer.read(tuple(by_name.values())), writer.mask(tuple(by_name.values()))
    told: dict[str, tuple[Tensor, dict[int, str]]] = {"input_ids": (ids, free[TARGET])}
    if mask is not None:
        told[HIDDEN_MASK] = mask, free[_MASK]
    alike = mask is not None and mask.shape == hidden.shape[:2]
    told[HIDDEN] = hidden, free[_MASK] if alike else {0: "batch"}
    decoder = replace(
        loaded, module=_with_forward(writer.module, _decode, tuple(told)), source=f"the decoder of {loaded.source}",
        input_names=tuple(told), example_inputs=tuple(tensor for tensor, _ in told.values()),
        dynamic_axes=tuple(axes for _, axes in told.values()), outputs=(WRITTEN,), writer=None, other_layers=paths,
        ends=writer.ends)
    return encoder, decoder


def _told(hidden: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """What the encoder made, as `forward` of the whole takes it."""
    from transformers.modeling_outputs import BaseModelOutput

    return {"encoder_outputs": BaseModelOutput(last_hidden_state=cast(Any, hidden)),
            **({} if mask is None else {_MASK: mask})}


def _encode(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {READ: model.get_encoder()(**inputs)[READ]}


def _decode(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    told = _told(inputs[HIDDEN], inputs.get(HIDDEN_MASK))
    return {WRITTEN: type(model).forward(model, decoder_input_ids=inputs["input_ids"], **told)[WRITTEN]}


def _with_forward(
    model: nn.Module, run: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]], names: Sequence[str]
) -> nn.Module:
    """The same model with another `forward`, which takes tensors called `names`."""
    def forward(self: Any, **inputs: Tensor) -> dict[str, Tensor]:
        return run(self, inputs)

    vars(forward)["__signature__"] = inspect.Signature([
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names)])
    half = copy.copy(model)
    half.forward = types.MethodType(forward, half)  # type: ignore[method-assign]
    return half


@contextmanager
def _said(what: str, batch: Sequence[Tensor]) -> Iterator[None]:
    """Whatever a stranger's model raises in the block, as a line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in batch)
        raise InputError(f"{what} does not run on {shapes}: {first_line(error)}") from error
