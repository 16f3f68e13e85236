"""`.pt2` files of torch.export.save: screened, built by torch, rehearsed before a kernel runs.

Program and weights are no pickles. The example inputs, which torch stores as one, may hold plain tensors only and are
read by torch's weights-only reader once their pickle was looked through.

Four steps, a file each: `pt2_archive` reads records and tensors, `pt2_screen` judges the program's document by a strict
grammar (`pt2_expressions`, `pt2_operators`), torch builds the program from exactly what was screened, and
`pt2_rehearsal` runs it on fake tensors (`divisions` looks at those of integers).
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.export import ExportedProgram

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends.pickled import first_line
from repquant_fx.frontends.pt2_archive import Archive, read_archive
from repquant_fx.frontends.pt2_operators import use_checked
from repquant_fx.frontends.pt2_rehearsal import rehearse
from repquant_fx.frontends.pt2_screen import output_classes, screen_program
from repquant_fx.torch_private import add_samples, build_program, load_archive, size_hint


def load_exported(
    data: bytes, where: str, *, allow_pickle: bool = False,
) -> tuple[ExportedProgram, tuple[Tensor, ...], bool]:
    """(the program, its example inputs, whether these were stored in the file).

    Inputs that are not stored are drawn with seed 0, with batch 2 where the batch is dynamic. A static batch,
    1 or other, is kept as it is.

    Args:
        data: the bytes of the file.
        where: its name, for messages.
        allow_pickle: the user trusts the file: let torch load it as it is.

    Raises:
        ModelFileError: damaged, unsafe (the message names the record or the node), of another torch, or with inputs
            that are not positional tensors.
        InputError: it asks for more memory than this machine has.
    """
    try:
        program = _trusted(data, where) if allow_pickle else _build(read_archive(data, where), where)
        stored = _stored_inputs(program, where)
        inputs = stored if stored is not None else _drawn_inputs(program, where)
        if not allow_pickle:
            with _quiet():
                rehearse(program, inputs, where)
        return program, inputs, stored is not None
    except InputError:
        raise
    except Exception as error:  # a document of another form than torch writes
        raise ModelFileError(f"not a model file: {where} is damaged ({first_line(error)})") from error


def _build(archive: Archive, where: str) -> ExportedProgram:
    """The program from its screened document and its tensors; torch sees nothing else of the file."""
    document = screen_program(archive.program, where)
    _register_outputs_of_transformers(output_classes(document))
    with _explained(where):
        program = build_program(document, archive.weights, archive.constants)
        use_checked(program.graph_module)
    add_samples(program, archive.samples)
    return program


def _trusted(data: bytes, where: str) -> ExportedProgram:
    with _explained(where):
        return load_archive(data)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except Exception as error:
        raise ModelFileError(f"{where} cannot be loaded by torch {torch.__version__}: {first_line(error)}. "
                             "Save it again with this torch") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs a traceback and a warning for each damaged file; ours is the message."""
    names = ("export", "fx.experimental.symbolic_shapes", "_subclasses.fake_tensor")
    loggers = [logging.getLogger(f"torch.{name}") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _register_outputs_of_transformers(modules: set[str]) -> None:
    """Output classes are known to tree specs once their module, one of the installed transformers', is imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # torch says which class it misses
            continue


def _stored_inputs(program: ExportedProgram, where: str) -> tuple[Tensor, ...] | None:
    stored = program.example_inputs
    if not stored:
        return None
    args, kwargs = stored
    if kwargs or not args or not all(isinstance(value, Tensor) for value in args):
        raise ModelFileError(f"{where} was exported with inputs that are not positional tensors; export it again with "
                             "tensors as args and without kwargs")
    return tuple(args)


def _drawn_inputs(program: ExportedProgram, where: str) -> tuple[Tensor, ...]:
    """Normal floats or zeros of integers, by the program's shapes; a symbolic batch becomes 2, others their hint."""
    generator = torch.Generator().manual_seed(0)
    users = set(program.graph_signature.user_inputs)
    drawn = []
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in users:
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise ModelFileError(f"{where}: the input {node.name} is not a tensor; export the module with tensors only")
        shape = tuple(_size(size, first=position == 0) for position, size in enumerate(value.shape))
        limits.check_size(shape, f"{where}: the input {node.name}", value.element_size())
        drawn.append(torch.randn(shape, generator=generator).to(value.dtype) if value.dtype.is_floating_point
                     else torch.zeros(shape, dtype=value.dtype))
    return tuple(drawn)


def _size(size: int | torch.SymInt, *, first: bool) -> int:
    if isinstance(size, int):
        return size
    hint = size_hint(size)
    return 2 if first or hint is None else hint
