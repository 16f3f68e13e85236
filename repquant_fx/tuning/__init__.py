"""The recipe that runs fastest on this machine, within a loss of quality.

    from repquant_fx import compile, tune
    tuned = tune("model.pt2", "images/", threads=1, max_drop=0.5)
    print(tuned)
    compile("model.pt2", "images/", tuned.recipe).save("model.onnx")
"""

from repquant_fx.tuning.candidates import Form
from repquant_fx.tuning.choose import Attempt, Speed, Trial, Verdict
from repquant_fx.tuning.conditions import Conditions
from repquant_fx.tuning.result import TuneResult
from repquant_fx.tuning.tuner import tune

__all__ = ["Attempt", "Conditions", "Form", "Speed", "Trial", "TuneResult", "Verdict", "tune"]
