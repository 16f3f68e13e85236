"""ONNX operators by what they do, as they stand in a file."""

PRODUCTS = ("MatMul", "Gemm", "Conv")
# elements of the input in another order or shape, or some of them
LAYOUT = {
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Split",
    "Expand",
    "Identity",
    "Gather",
    "Concat",
}
