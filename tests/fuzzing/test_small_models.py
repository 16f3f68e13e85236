"""Property: a small model of any kind compiles to a file that agrees with its reference, or is refused with one line. Nothing else.

`REPQUANT_FX_FUZZ=N` sets how many models the slow test tries (2,000), `REPQUANT_FX_FUZZ_SEED=S` which: processes with different seeds
share the work, and a seed gives the same models again.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from small_models import Case, cases

from repquant_fx import compile
from repquant_fx.errors import InputError, RepQuantWarning

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
COMMON = {"deadline": None, "database": None, "suppress_health_check": CHECKS, "print_blob": True}


def outcome(case: Case) -> str:
    """`compiled` or `refused`; raises on anything else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            compiled = compile(case.model, case.batches, case.recipe, example_inputs=case.inputs)
        except InputError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 1500, message
            assert not message.startswith("ONNX Runtime cannot load"), message  # the file is ours
            return "refused"
    assert compiled.parity is not None and not compiled.parity.problems()
    ours = [w for w in caught if issubclass(w.category, RepQuantWarning)]
    assert len(ours) < 6, [str(w.message) for w in ours]
    return "compiled"


@settings(max_examples=25, derandomize=True, phases=[Phase.generate], **COMMON)
@given(cases())
def test_a_few_models(case: Case) -> None:
    outcome(case)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_models() -> None:
    counts: Counter[str] = Counter()

    @seed(int(os.environ.get("REPQUANT_FX_FUZZ_SEED", "0")))
    @settings(max_examples=int(os.environ.get("REPQUANT_FX_FUZZ", "2000")), **COMMON)
    @given(cases())
    def run(case: Case) -> None:
        counts[outcome(case)] += 1

    run()
    print(dict(counts))
    assert counts["compiled"] > sum(counts.values()) / 4, counts  # a fuzzer of refusals would show little
