"""Zero-shot and few-shot tasks of causal language models, by the evaluation harness `lm_eval`, which is imported here.

A model of ours is one of the harness's: it scores continuations, and continues texts, with any `Runner`: an exported
file under ONNX Runtime, with a key/value cache or without, or the float model under torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repquant_fx.errors import InputError, first_line
from repquant_fx.evaluation.decoder import Decoder, has_cache
from repquant_fx.evaluation.perplexity import prefix_of, token_logits
from repquant_fx.evaluation.runners import Runner
from repquant_fx.evaluation.text import check_vocabulary, sequence_length, tokenize, tokenizer_for

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
_TOKENS = 256  # that a task may have generated, where it does not say


@dataclass(frozen=True)
class TaskScores:
    """Metrics of each task, by their names in the harness, such as `acc` and `acc_norm`."""

    tasks: dict[str, dict[str, float]]

    def __str__(self) -> str:
        return "\n".join(
            f"{task}  " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            for task, scores in self.tasks.items()
        )


def run_tasks(
    runner: Runner,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seq_len: int | None = None,
    tokenizer: str | None = None,
    download: bool = False,
    seed: int = 0,
) -> TaskScores:
    """Run tasks of the harness.

    Args:
        tasks: names, such as `piqa` or `arc_easy`; of groups, too.
        include: a folder with tasks of your own, in the harness's format. Such files may run code.
        shots: solved examples before each question; as the task says where None.
        limit: questions of each task, the first.
        batch_size: questions at a time.
        seq_len: longer texts lose their beginning; as long as the model takes and 2048 at most where None.
        tokenizer: directory; the model's own where None.
        download: fetch data sets that are not in the cache of `datasets`. Else the network is not used.
        seed: of the examples.

    Raises:
        InputError: lm_eval is not installed, there is no such task, its data is not there, or the model does not run.
    """
    if not download:
        _stay_offline()
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"tasks need lm_eval ({error}): pip install 'repquant-fx[tasks]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise InputError(f"lm_eval has no task {', '.join(unknown)[:200]}; `lm-eval ls tasks` lists them")
    model = model_class()(runner, tokenizer=tokenizer, seq_len=seq_len, batch_size=batch_size)
    try:
        found: Any = simple_evaluate(model=model, tasks=list(tasks), num_fewshot=shots, limit=limit, bootstrap_iters=0,
                                     task_manager=manager, log_samples=False, random_seed=seed,
                                     numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed)
    except InputError:
        raise
    except Exception as error:
        advice = "" if download else "; data sets that are not in the cache of datasets need --download"
        raise InputError(f"the tasks {', '.join(tasks)} do not run: {type(error).__name__}: {first_line(error)}"
                         f"{advice}") from error
    return TaskScores({task: _numbers(scores) for task, scores in found["results"].items()})


def model_class() -> type[Any]:
    """The class of models for the harness, `RepQuantLM(runner, tokenizer=None, seq_len=None, batch_size=1)`: a
    `lm_eval.api.model.TemplateLM`, to be given to `lm_eval.simple_evaluate`.
    """
    from lm_eval.api.model import TemplateLM

    class RepQuantLM(TemplateLM):  # type: ignore[misc]
        """Scores and continues texts with a `Runner`."""

        def __init__(
            self, runner: Runner, *, tokenizer: str | None = None, seq_len: int | None = None, batch_size: int = 1
        ) -> None:
            super().__init__()
            self.runner, self.tokenizer, self.batch_size = runner, tokenizer_for(runner, tokenizer), batch_size
            self.max_length = sequence_length(runner, self.tokenizer, seq_len)
            self.prefix = prefix_of(self.tokenizer)

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id or 0)

        @property
        def prefix_token_id(self) -> int:
            return self.prefix[0] if self.prefix else self.eot_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            (bare,) = tokenize(self.tokenizer, [string], add_special_tokens=False)
            return bare if add_special_tokens is False else [*self.prefix, *bare]

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            rows = [cut(context, continuation, self.max_length) for _, context, continuation in requests]
            check_vocabulary(self.runner, [tokens for tokens, _ in rows])
            return score_rows(self.runner, rows, self.batch_size)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                tokens = self.tok_encode(request.args[0], add_special_tokens=False)
                size = self.max_length - 1
                parts = [tokens[i:i + size] for i in range(0, len(tokens), size)]
                before = [[self.prefix_token_id], *(part[-1:] for part in parts)]
                rows = [cut(context, part, self.max_length) for context, part in zip(before, parts)]
                found.append(sum(score for score, _ in score_rows(self.runner, rows, self.batch_size)))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._continued(*request.args) for request in requests]

        def _continued(self, context: str, how: dict[str, Any]) -> str:
            if how.get("do_sample") and how.get("temperature"):
                raise InputError("tasks that draw tokens by chance are not supported: temperature must be 0")
            given = how.get("until") or []
            stops = [given] if isinstance(given, str) else list(given)
            most = int(how.get("max_gen_toks", _TOKENS))
            return continue_text(self.runner, self.tokenizer, self.tok_encode(context)[most - self.max_length:], stops,
                                 most, self.eot_token_id)

    return RepQuantLM


def cut(context: Sequence[int], continuation: Sequence[int], length: int) -> tuple[list[int], int]:
    """(tokens, how many of them at the end are scored): the beginning goes where there are too many."""
    tokens = [*context, *continuation][-length:]
    return tokens, min(len(continuation), len(tokens) - 1)


def score_rows(
    runner: Runner, rows: Sequence[tuple[Sequence[int], int]], batch_size: int
) -> list[tuple[float, bool]]:
    """For each row its score: the sum of the log probabilities of its last tokens, each after all before it; and
    whether each is the likeliest one. Rows of equal length are run together.

    Raises:
        InputError: the logits are not finite, or the model does not run.
    """
    found: dict[int, tuple[float, bool]] = {}
    size = runner.limit(runner.inputs[0].name, batch_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    while order:
        length = len(rows[order[0]][0])
        batch = [i for i in order[:size] if len(rows[i][0]) == length]
        order = order[len(batch):]
        for index, logits in zip(batch, token_logits(runner, [rows[i][0] for i in batch])):
            tokens, count = rows[index]
            first = len(tokens) - count
            found[index] = score(logits[first - 1:len(tokens) - 1], torch.tensor(tokens[first:]))
    return [found[i] for i in range(len(rows))]


def score(logits: Tensor, wanted: Tensor) -> tuple[float, bool]:
    """Log probability of tokens, shape (n,), by logits, shape (n, vocabulary), in float64; and whether each is the
    likeliest.

    Raises:
        InputError: the logits are not finite.
    """
    if not torch.isfinite(logits).all():
        raise InputError("the logits are NaN or infinite")
    chances = logits.double().log_softmax(-1)
    return float(chances.gather(-1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


def continue_text(
    runner: Runner, tokenizer: Any, tokens: Sequence[int], stops: Sequence[str], most: int, end: int
) -> str:
    """The likeliest continuation, token by token, until one of the texts in `stops`, which is left out."""
    step = _stepper(runner)
    found: list[int] = []
    given = list(tokens)
    while len(found) < most:
        token = int(step(given).argmax())
        if token == end:
            break
        found.append(token)
        given = [token]
        text = str(tokenizer.decode(found))
        if reached := [text.index(stop) for stop in stops if stop and stop in text]:
            return text[:min(reached)]
    return str(tokenizer.decode(found))


def _stepper(runner: Runner) -> Callable[[list[int]], Tensor]:
    """A function of further tokens to the logits after the last, shape (vocabulary,)."""
    if has_cache(runner):
        decoder = Decoder(runner)
        return lambda given: decoder(torch.tensor([given]))[0, -1]
    seen: list[int] = []

    def step(given: list[int]) -> Tensor:
        seen.extend(given)
        return token_logits(runner, [seen])[0, len(seen) - 1]

    return step


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Metrics without the name of a filter; standard errors are not asked for."""
    return {name.removesuffix(",none"): float(value) for name, value in scores.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "_stderr" not in name
            and "," in name}


def _stay_offline() -> None:
    """No network for the libraries under the harness, also where one of them is already imported."""
    for name in _OFFLINE:
        os.environ[name] = "1"
    import huggingface_hub.constants as constants

    constants.HF_HUB_OFFLINE = True
    try:
        import datasets
    except ImportError:
        return
    datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
