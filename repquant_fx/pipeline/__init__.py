"""The sequential pipeline (RepQuant Algorithm 1): groups in graph order, each calibrated on what the quantized prefix
produces.

The graph is cut where few values are live. Only the cut values of all calibration batches are kept; one segment runs at
a time and the prefix never runs again, so cost grows linearly with depth and memory is bounded by one segment and its
cut values.
"""

from repquant_fx.pipeline.equalization import equalize_layers
from repquant_fx.pipeline.reconstruction import reconstruct
from repquant_fx.pipeline.rotation import rotate
from repquant_fx.pipeline.sequential import Quantized, quantize_sequentially

__all__ = ["Quantized", "equalize_layers", "quantize_sequentially", "reconstruct", "rotate"]
