"""The result of a compile: the ONNX model, its report, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from torch.fx import GraphModule, Node

from repquant_fx.errors import ModelFileError
from repquant_fx.exporters.apart import BESIDE_FROM, OnnxModel, is_data_of
from repquant_fx.exporters.reading import read_onnx
from repquant_fx.files import (
    MODEL,
    Content,
    check_directory,
    check_writable,
    is_directory,
    write_directory,
    write_together,
)
from repquant_fx.parity import Parity


@dataclass
class CompiledModel:
    """The result of `compile`.

    Attributes:
        model: the ONNX model, its matrices apart from it.
        report: what was done and measured; JSON data (see `report.build`).
        graph_module: the lowered graph, the FX reference of the file.
        quantizers: nodes of `graph_module` that produce codes, by site name.
        parity: the comparison with ONNX Runtime, None if it was not asked for.
        companions: what belongs beside the file in a directory (configuration, tokenizer, processor), by name.
        statistics: what the page of `html` draws of each layer, JSON data; None if it was not asked for.
        external_data: whether `save` writes the matrices into a data file beside the model, whatever its size.
    """

    model: OnnxModel
    report: dict[str, Any]
    graph_module: GraphModule
    quantizers: dict[str, Node]
    parity: Parity | None
    companions: dict[str, bytes] = field(default_factory=dict)
    statistics: dict[str, Any] | None = None
    external_data: bool = False

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """A copy of the ONNX model with all that belongs to it, made when it is asked for."""
        return self.model.inlined()

    def to_bytes(self) -> bytes:
        """The model as one file; the same model, data, recipe and seed give the same bytes.

        Raises:
            InputError: it would pass 2 GiB; `save` can write it.
        """
        return self.model.to_bytes()

    def save(
        self, path: str | Path, *, force: bool = False, report: str | Path | None = None,
        html: str | Path | None = None, command: str | None = None,
    ) -> Path:
        """Write the model, and the report as JSON or as a page where paths are given. Complete or not at all.

        Args:
            path: a file where it ends in `.onnx`; else a directory, which gets `model.onnx` and `companions`. Past
                1.5 GB, or with `external_data`, the matrices go into a data file beside the model; that of the model
                which is replaced is removed.
            html, command: where the page goes, and see `html`.

        Returns:
            where the model was written.

        Raises:
            OutputError: a file exists and `force` is not set, or it cannot be written.
            InputError: the page needs plotly, which is not installed.
        """
        folder, within = Path(path), is_directory(path)
        target = folder / MODEL if within else Path(path)
        content = self.content(target.name)
        extras: dict[Path, Content] = {}
        if report is not None:
            extras[Path(report)] = self.report_json().encode()
        if html is not None:
            extras[Path(html)] = self.html(command).encode()
        if not within:
            check_writable(target, force)
            here = {target.with_name(name): data for name, data in content.items()}
            write_together({**here, **{check_writable(p, force): data for p, data in extras.items()}},
                           superseded(target, content))
            return target
        inside = {p.name: data for p, data in extras.items() if p.parent.resolve() == folder.resolve()}
        outside = {p: data for p, data in extras.items() if p.parent.resolve() != folder.resolve()}
        files: dict[str, Content] = {**self.companions, **inside, **content}
        folder = check_directory(folder.resolve(), files, force)
        write_directory(folder, files, {check_writable(p, force): data for p, data in outside.items()},
                        superseded(target, content))
        return folder / MODEL

    def content(self, name: str) -> dict[str, Content]:
        """What a file of this name and the data file beside it hold, the file last; the report is told of both."""
        if not self.external_data and self.model.size() < BESIDE_FROM:
            return {name: self.to_bytes()}
        data, beside = self.model.beside(name)
        for location, parts in beside.items():
            self.report |= {"file_bytes": len(data) + len(parts), "data_file": location}
        return {**beside, name: data}

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

        return session(self.model, threads=threads, accuracy_level=accuracy_level)


def superseded(path: Path, kept: Container[str]) -> list[Path]:
    """The data file of the model that is to be replaced, where that is named as its own and is not `kept`.

    What lies there under such a name without belonging to it stays: another process may be about to put its model into
    place, which is renamed after its data.
    """
    try:
        if not any(is_data_of(each.name, path.name) for each in path.parent.iterdir()):
            return []
        names = list(read_onnx(path).files)
    except (OSError, ModelFileError):  # there is none, or none of ours
        return []
    return [path.with_name(name) for name in names if is_data_of(name, path.name) and name not in kept]
