"""The result of a compile: the ONNX model, its report, and how they are written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from torch.fx import GraphModule, Node

from repquant_fx.files import MODEL, check_directory, check_writable, is_directory, write_directory, write_together
from repquant_fx.parity import Parity


@dataclass
class CompiledModel:
    """The result of `compile`.

    Attributes:
        proto: the ONNX model.
        report: what was done and measured; JSON data (see `report.build`).
        graph_module: the lowered graph, the FX reference of the file.
        quantizers: nodes of `graph_module` that produce codes, by site name.
        parity: the comparison with ONNX Runtime, None if it was not asked for.
        companions: what belongs beside the file in a directory (configuration, tokenizer, processor), by name.
        statistics: what the page of `html` draws of each layer, JSON data; None if it was not asked for.
    """

    proto: onnx.ModelProto
    report: dict[str, Any]
    graph_module: GraphModule
    quantizers: dict[str, Node]
    parity: Parity | None
    companions: dict[str, bytes] = field(default_factory=dict)
    statistics: dict[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """The file's bytes; the same model, data, recipe and seed give the same bytes."""
        return self.proto.SerializeToString(deterministic=True)

    def save(
        self, path: str | Path, *, force: bool = False, report: str | Path | None = None,
        html: str | Path | None = None, command: str | None = None,
    ) -> Path:
        """Write the model, and the report as JSON or as a page where paths are given. Complete or not at all.

        Args:
            path: a file where it ends in `.onnx`; else a directory, which gets `model.onnx` and `companions`.
            html, command: where the page goes, and see `html`.

        Returns:
            where the model was written.

        Raises:
            OutputError: a file exists and `force` is not set, or it cannot be written.
            InputError: the page needs plotly, which is not installed.
        """
        extras: dict[Path, bytes] = {}
        if report is not None:
            extras[Path(report)] = self.report_json().encode()
        if html is not None:
            extras[Path(html)] = self.html(command).encode()
        if not is_directory(path):
            path = check_writable(path, force)
            write_together({path: self.to_bytes(), **{check_writable(p, force): data for p, data in extras.items()}})
            return path
        folder = Path(path).resolve()
        inside = {p.name: data for p, data in extras.items() if p.parent.resolve() == folder}
        outside = {p: data for p, data in extras.items() if p.parent.resolve() != folder}
        files = {**self.companions, **inside, MODEL: self.to_bytes()}
        path = check_directory(path, files, force)
        write_directory(path, files, {check_writable(p, force): data for p, data in outside.items()})
        return path / MODEL

    def html(self, command: str | None = None) -> str:
        """The report as one self-contained page. Its figures of single layers need a model compiled with
        `statistics=True`.

        Args:
            command: the command line that made the model, where one did.

        Raises:
            InputError: plotly is not installed.
        """
        from repquant_fx.html import page

        return page(self.report, self.statistics, command=command)

    def report_json(self) -> str:
        """The report as indented JSON, with the statistics where they were collected."""
        statistics = {} if self.statistics is None else {"statistics": self.statistics}
        return json.dumps({**self.report, **statistics}, indent=2, sort_keys=False) + "\n"

    def session(self, threads: int | None = None, accuracy_level: int = 1) -> Any:
        """An ONNX Runtime session on the model; see `runtime.session`."""
        from repquant_fx.runtime import session

        return session(self.to_bytes(), threads=threads, accuracy_level=accuracy_level)
