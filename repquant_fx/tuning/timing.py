"""Times of models that take turns on this machine.

Two sessions at a time: the start's, and one other. They take turns in one process, in alternating order, a few runs
each, and each turn counts with the median of its runs. ONNX Runtime's threads sleep between turns (see
`runtime.session`), or those of the one session would take time from the other.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.runtime import session
from repquant_fx.runtimes import OPENVINO_FLOAT32, compile_openvino

Runner = Callable[[], object]
TURNS = 15
WARM = 2  # runs before the first turn


def runner(model: OnnxModel, runtime: str, inputs: Mapping[str, np.ndarray], threads: int | None) -> Runner:
    """What runs a model once, on its inputs among those given.

    Args:
        runtime: `ort` or `openvino`; the latter with float operators in float32, as the compiler checks files.
        threads: the runtime's default where None.

    Raises:
        ModelFileError: the runtime refuses the model.
    """
    if runtime == "openvino":
        settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, **OPENVINO_FLOAT32}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        request = compile_openvino(model, settings).create_infer_request()
        known = {name for each in request.model_inputs for name in each.get_names()}
        taken = {name: value for name, value in inputs.items() if name in known}
        return lambda: request.infer(taken)
    found = session(model, threads=threads, spin=False)
    feed = {node.name: inputs[node.name] for node in found.get_inputs()}
    return lambda: found.run(None, feed)


def take_turns(
    runners: Sequence[Runner], seconds: float, turns: int = TURNS, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of a run of each, turn by turn.

    Args:
        seconds: that each shall run in all, about; one run a turn at least.
        turns: of each.
        clock: seconds that have passed.

    Returns:
        for each runner the median of its runs in every turn.
    """
    def timed(run: Runner) -> float:
        began = clock()
        run()
        return clock() - began

    collecting = gc.isenabled()
    gc.disable()
    try:
        warm = [[timed(run) for _ in range(WARM)][-1] for run in runners]
        runs = [max(1, round(seconds / turns / max(each, 1e-9))) for each in warm]
        found: list[list[float]] = [[] for _ in runners]
        for turn in range(turns):
            order = range(len(runners)) if turn % 2 == 0 else reversed(range(len(runners)))
            for index in order:
                found[index].append(statistics.median(timed(runners[index]) for _ in range(runs[index])))
        return found
    finally:
        if collecting:
            gc.enable()
