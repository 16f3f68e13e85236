"""A model that decodes with a key/value cache: new tokens in, their logits out; what it keeps of the old ones stays
here in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repquant_fx import limits
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.errors import InputError
from repquant_fx.evaluation.runners import Runner
from repquant_fx.frontends.past import is_cache, output_name, positions_of


def has_cache(runner: Runner) -> bool:
    """Whether a model takes keys and values of earlier tokens."""
    return any(is_cache(spec.name) for spec in runner.inputs)


def half_way(runner: Runner, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Inputs of a decoder on the second half of sequences, with the caches that it made of the first.

    Args:
        ids, mask: of whole sequences, shape (sequences, tokens), int64.

    Raises:
        InputError: the model has no cache, or does not run on them.
    """
    decoder, half = Decoder(runner), ids.shape[1] // 2
    if half:
        decoder(ids[:, :half], mask[:, :half])
    return decoder.feed(ids[:, half:], mask[:, half:])


class Decoder:
    """A model with a key/value cache, in the middle of some sequences.

    Attributes:
        caches: keys and values of the tokens so far, by the names of the inputs; empty at first.
    """

    def __init__(self, runner: Runner) -> None:
        """
        Raises:
            InputError: the model has no cache.
        """
        self.runner = runner
        self.caches: dict[str, Tensor] = {}
        self._specs = [spec for spec in runner.inputs if is_cache(spec.name)]
        self._mask: Tensor | None = None
        if not self._specs:
            raise InputError(f"{runner.source} keeps no keys and values: compile it with --with-past")

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Go on with further tokens.

        Args:
            ids: shape (sequences, tokens), int64.
            mask: of the same shape, 0 where a token is padding.

        Returns:
            logits, shape (sequences, tokens, vocabulary).

        Raises:
            InputError: the model does not run on them.
        """
        feed = self.feed(ids, mask)
        outputs, caches = self.runner(feed), [spec.name for spec in self._specs]
        if missing := [name for name in ("logits", *map(output_name, caches)) if name not in outputs]:
            raise InputError(f"{self.runner.source} decodes with a cache, but gives no {', '.join(missing)}")
        logits = outputs["logits"]
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise InputError(f"{self.runner.source} gives logits of shape {list(logits.shape)} for tokens of shape "
                             f"{list(ids.shape)}; expected (sequences, tokens, vocabulary)")
        self._mask = feed["attention_mask"]
        self.caches = {name: outputs[output_name(name)] for name in caches}
        return logits

    def feed(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """What the model takes for further tokens, by name; arguments as of a call."""
        new = torch.ones_like(ids) if mask is None else mask
        whole = new if self._mask is None else torch.cat([self._mask, new], 1)
        caches = self.caches or {spec.name: self._empty(spec, len(ids)) for spec in self._specs}
        feed = {"input_ids": ids, "attention_mask": whole, **caches}
        if self.runner.input("position_ids") is not None:
            feed["position_ids"] = positions_of(whole)[:, -ids.shape[1]:]
        return feed

    def _empty(self, spec: InputSpec, sequences: int) -> Tensor:
        """A cache without tokens; its free sizes but the first are 0."""
        shape = [size or 0 for size in (sequences, *spec.shape[1:])]
        limits.check_size(shape, f"{spec.name} of {self.runner.source}", itemsize=spec.dtype.itemsize)
        return torch.zeros(shape, dtype=spec.dtype)
