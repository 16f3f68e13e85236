"""Property: a small model of any kind compiles to a file that agrees with its reference, or is refused with one line.

Nothing else. `REPQUANT_FX_FUZZ=N` sets how many models the slow test tries (2,000), `REPQUANT_FX_FUZZ_SEED=S` which:
processes with different seeds share the work, and a seed gives the same models again. Every failure is printed with the
number of its model, and the run goes on; `REPQUANT_FX_FUZZ_ONLY=17,200-299` compiles these numbers alone, and
`REPQUANT_FX_FUZZ_SHRINK=1` stops at the first failure and looks for the smallest model that shows it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from small_data import fresh
from small_models import Case, cases
from torch import Tensor

from repquant_fx import CompiledModel, compile
from repquant_fx.errors import InputError, RepQuantWarning
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.runtime import run as run_session

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
COMMON = {"deadline": None, "database": None, "suppress_health_check": CHECKS, "print_blob": True}
OTHER_BATCH = 5
CHOOSES = re.compile(r"nonzero|aten\.index\.")


def outcome(case: Case) -> str:
    """`compiled`, or `refused: ` and the beginning of the reason; raises on anything else."""
    model = case.model
    if case.form == "program":
        try:
            model = torch.export.export(case.model, tuple(t.clone() for t in case.inputs), strict=False)
        except Exception:
            return "refused: torch cannot export it"
    handed = [*case.inputs, *(t for batch in case.batches for t in batch), *case.model.state_dict().values()]
    before = [t.clone() for t in handed]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            compiled = compile(model, case.batches, case.recipe, example_inputs=case.inputs)
        except InputError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 1500, message
            assert not message.startswith("ONNX Runtime cannot load"), message  # the file is ours
            return f"refused: {message[:40]}"
        finally:
            assert all(_equal(a, b) for a, b in zip(before, handed, strict=True)), "what was given has changed"
    assert compiled.parity is not None and not compiled.parity.problems()
    ours = [w for w in caught if issubclass(w.category, RepQuantWarning)]
    assert len(ours) < 8, [str(w.message) for w in ours]
    json.loads(compiled.report_json(), parse_constant=_no_json)
    if compiled.report["capture"]["dynamic_batch"]:
        _check_another_batch(case, compiled)
    return "compiled"


def _check_another_batch(case: Case, compiled: CompiledModel) -> None:
    """The file takes another number of samples than any that it was made with."""
    graph = compiled.graph_module.graph
    dtypes = [node.meta["val"].dtype for node in graph.find_nodes(op="placeholder")]
    inputs = [fresh([OTHER_BATCH, *t.shape[1:]], dtype, 99) for t, dtype in zip(case.inputs, dtypes, strict=True)]
    try:
        with torch.no_grad():
            expected = tensors_in(compiled.graph_module(*inputs))
    except (RuntimeError, IndexError, ValueError):
        return  # the model itself does not
    session = compiled.session()
    found = run_session(session, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))
    assert [(f.dtype, f.ndim) for f in found] == [(e.dtype, e.ndim) for e in expected]
    if not any(CHOOSES.search(str(node.target)) for node in graph.nodes):  # how many are chosen follows from the codes
        assert [f.shape for f in found] == [e.shape for e in expected]


def _no_json(text: str) -> float:
    raise AssertionError(f"{text} in a report, which is no JSON")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.where(a == a, a == b, b != b).all())


@settings(max_examples=25, derandomize=True, phases=[Phase.generate], **COMMON)
@given(cases())
def test_a_few_models(case: Case) -> None:
    outcome(case)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_models() -> None:
    shrink, only = os.environ.get("REPQUANT_FX_FUZZ_SHRINK"), os.environ.get("REPQUANT_FX_FUZZ_ONLY")
    chosen = numbers(only) if only else None
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    number = -1

    @seed(int(os.environ.get("REPQUANT_FX_FUZZ_SEED", "0")))
    @settings(
        max_examples=int(os.environ.get("REPQUANT_FX_FUZZ", "2000")),
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        **COMMON,
    )
    @given(cases())
    def run(case: Case) -> None:
        nonlocal number
        number += 1
        if chosen is not None and number not in chosen:
            if number > max(chosen):
                raise _Enough
            return
        try:
            counts[outcome(case)] += 1
            if counts.total() % 100 == 0:
                print(f"{counts['compiled']} of {counts.total()} compiled", flush=True)
        except Exception as error:
            if shrink:
                raise
            failures[described(error)] += 1
            print(f"\nmodel {number} fails: {described(error)}\n{case!r}", flush=True)
            if chosen is not None and len(chosen) < 20:
                traceback.print_exception(error, file=sys.stdout)

    with contextlib.suppress(_Enough):
        run()
    total = counts.total() + failures.total()
    print(*(f"{count:6}  {what}" for what, count in counts.most_common()), f"{total:6}  in all", sep="\n")
    assert not failures, "\n".join(f"{count:6}  {what}" for what, count in failures.most_common())
    assert counts["compiled"] > 0.4 * total, counts  # a fuzzer of refusals would show little


def numbers(text: str) -> set[int]:
    """Of `3,10-12`: 3, 10, 11 and 12."""
    ranges = [part.partition("-") for part in text.split(",")]
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}


class _Enough(BaseException):
    """All models that were asked for were tried; no Exception, which would be a finding."""


def described(error: Exception) -> str:
    """What went wrong and where, in a line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__} in {place.name}: {lines[0][:300] if lines else ''}"
