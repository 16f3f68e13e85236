"""What a file must be for the runtime that will run it: one table, a row for each kind of runtime.

A target decides what the file looks like, not how the model is quantized, so it is an option of the export and no part
of the recipe. Two of its columns reach into the recipe all the same: the container of codes of up to 4 bits, and the
bits that weights may have where full-range weights give wrong sums. The recipe stored in the file is the one that was
used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from repquant_fx.errors import InputError
from repquant_fx.recipe_settings import FLOAT, nearest

if TYPE_CHECKING:
    from repquant_fx.recipe import Recipe

DEFAULT = "ort-cpu"
OPSET = 21  # the first one with types of 4 bits
LOWEST_OPSET, HIGHEST_OPSET = 17, 27  # LayerNormalization came with 17; ONNX Runtime 1.32 has no kernels past 27

RUNTIMES = {"ort": "ONNX Runtime", "openvino": "OpenVINO", "reference": "onnx.reference"}


@dataclass(frozen=True)
class Target:
    """One kind of runtime, and what a file for it may hold.

    Attributes:
        name: what `--target` takes.
        about: who reads such a file, in a few words.
        inlined: whether the functions of our own domain are replaced by the standard operators they consist of.
        flat: whether Linears run on matrices and write the codes of what they feed (see
            `passes.runtime_form.optimize_for_runtime`), which ONNX Runtime fuses; OpenVINO fuses the other form, and
            knows products of codes alone that have no zero points (see `exporters.signed_codes`).
        containers: those it takes (see `Recipe.container`), the first where the recipe asks for no other.
        opset: of the standard operators. The IR version is the first that knows this opset.
        operators: of the standard domain, that may appear; None for all of the opset.
        refused: element types that no tensor may have.
        weight_bits: the most that weights may have. Less than 8 where the runtime adds two products of uint8 and int8
            in 16 bits that saturate (see `quantizers.saturation`).
        runtime: what the compiler checks the file in, where it is installed (see `runtimes`).
        tested: with which version of it the tests of this package passed.
    """

    name: str
    about: str
    inlined: bool = True
    flat: bool = True
    containers: tuple[str, ...] = ("int8",)
    opset: int = OPSET
    operators: frozenset[str] | None = None
    refused: frozenset[str] = frozenset()
    weight_bits: int = 8
    runtime: str = "ort"
    tested: str = ""

    def recipe(self, given: Recipe) -> Recipe:
        """The recipe that is used for this target: its container, and no weight of more bits than it takes.

        Raises:
            InputError: the recipe asks for a container that the target does not take.
        """
        container = given.container
        if container not in self.containers:
            if container != "int8":  # int8 is what a recipe says that asks for nothing
                raise InputError(f"the target {self.name} takes no container {container}: its files hold codes in "
                                 f"{' or '.join(self.containers)}; leave --container out, or take another target")
            container = self.containers[0]
        if given.weight_only and all(rule.abits in (None, FLOAT) for rule in given.layers):  # no product of integers
            return replace(given, container=container)
        rules = tuple(
            rule if rule.wbits is None else replace(rule, wbits=min(rule.wbits, self.weight_bits))
            for rule in given.layers
        )
        return replace(given, container=container, wbits=min(given.wbits, self.weight_bits), layers=rules)

    def describe(self) -> str:
        """The row of the table as one sentence."""
        functions = "inlined" if self.inlined else "kept"
        takes = [
            f"functions {functions}", "Linears on matrices" if self.flat else "Linears on tokens",
            f"container {' or '.join(self.containers)}", f"opset {self.opset}",
            f"weights of at most {self.weight_bits} bits",
            *([f"only {', '.join(sorted(self.operators))}"] if self.operators is not None else []),
            *([f"no {', '.join(sorted(self.refused))}"] if self.refused else []),
            f"checked in {RUNTIMES[self.runtime]}", f"tested with {self.tested}",
        ]
        return "; ".join(takes)

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        data = asdict(self)
        data["operators"] = None if self.operators is None else sorted(self.operators)
        return {**data, "containers": list(self.containers), "refused": sorted(self.refused)}


TARGETS = {
    target.name: target
    for target in (
        Target(DEFAULT, "ONNX Runtime on a CPU with VNNI, or on ARM", inlined=False, containers=("int8", "int4"),
               tested="onnxruntime 1.32.0"),
        Target("ort-cpu-avx2", "ONNX Runtime on an x86 CPU without VNNI", inlined=False, weight_bits=7,
               tested="onnxruntime 1.32.0, on a CPU with VNNI; its arithmetic without by an exact model"),
        # it takes UINT4 quantizers and computes something else: 16 dB where ONNX Runtime's answer is exact
        Target("openvino", "OpenVINO on a CPU", flat=False, refused=frozenset({"UINT4"}), runtime="openvino",
               tested="openvino 2026.4.1"),
        Target("onnx", "any runtime of standard ONNX: onnx.reference, ONNX Runtime Web, compilers",
               containers=("int8", "int4"), runtime="reference", tested="onnx 1.23.2"),
        Target("int4", "tool chains of accelerators that read 4-bit Q/DQ", containers=("int4",),
               tested="onnxruntime 1.32.0 and onnx.reference; no accelerator"),
    )
}
TIMED = (DEFAULT, "ort-cpu-avx2", "openvino")  # those whose runtime runs here as it will where the file is used


def find(name: str = DEFAULT, opset: int | None = None) -> Target:
    """The target of a name, with another opset where one is given.

    Raises:
        InputError: there is no such target, or no such opset.
    """
    if name not in TARGETS:
        raise InputError(f"no target {name!r}{nearest(name, TARGETS)}; one of {', '.join(TARGETS)}")
    if opset is None:
        return TARGETS[name]
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise InputError(f"opset {opset}: a file is written in one from {LOWEST_OPSET} to {HIGHEST_OPSET}")
    return replace(TARGETS[name], opset=opset)
