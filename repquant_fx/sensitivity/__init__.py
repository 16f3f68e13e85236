"""Which layers suffer from few bits, and which bits each should have.

    from repquant_fx.sensitivity import search, sensitivity
    print(sensitivity("model.pt2", "images/", Recipe(wbits=4, abits=4)))
    result = search("model.pt2", "images/", Recipe(abits=8), target_size="3b", count="information")
    compile("model.pt2", "images/", result.recipe).save("model.onnx")
"""

from repquant_fx.sensitivity.analysis import LOSSES, Sensitivity, sensitivity
from repquant_fx.sensitivity.frontier import SearchResult, Trial
from repquant_fx.sensitivity.search import search
from repquant_fx.sensitivity.size import COUNTS
from repquant_fx.sensitivity.units import Unit

__all__ = ["COUNTS", "LOSSES", "SearchResult", "Sensitivity", "Trial", "Unit", "search", "sensitivity"]
