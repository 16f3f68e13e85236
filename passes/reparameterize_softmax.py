"""Scale reparameterization of Softmax quantizers (RepQuant Eq. 15-17): log-sqrt2 while calibrating, a shift at
inference.
"""

from __future__ import annotations

from torch.fx import GraphModule

from repquant_fx.passes.base import Pass
from repquant_fx.passes.match_sites import Group
from repquant_fx.passes.slots import install, log_quantizers
from repquant_fx.passes.spec import OBSERVED
from repquant_fx.quantizers.observers import ShiftLogQuantizer


class ReparameterizeSoftmax(Pass):
    """Replaces the `LogQuantizer` at a Softmax operand (float32, any shape) by one that dequantizes by shifts; codes
    and scale (a float32 scalar) stay.
    """

    name = "reparameterize softmax"
    needs = "a logarithmic quantizer at the group's Softmax operand"
    guarantees = "the same values for every code, computed by a shift of a scale chosen by the code's low bits"
    takes = gives = OBSERVED

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def run(self, graph_module: GraphModule) -> bool:
        modified = False
        for site, module in log_quantizers(graph_module, self.group):
            if module.steps > 1:
                shift = ShiftLogQuantizer(float(module.scale), module.bits, module.steps, normalized=module.normalized)
                install(graph_module, site, shift)
                modified = True
        return modified
