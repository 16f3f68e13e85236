"""Errors that a user can act on. Each says what was wrong, where, and what to do; the CLI prints them without a
traceback.

Exit codes of the CLI: 0 success, 1 internal error (a bug), 2 bad input (`InputError`), 3 the exported file disagrees
with the FX reference (`ParityError`), 130 interrupted (SIGINT), 143 terminated (SIGTERM), 129 hung up (SIGHUP).
"""

from __future__ import annotations


class RepQuantError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the CLI returns."""

    exit_code = 1


class InputError(RepQuantError):
    """Something the user gave cannot be used: a file, a shape, an option, a model."""

    exit_code = 2


class ModelFileError(InputError):
    """A model file cannot be read, is not a model, or would execute code when loaded."""


class CaptureError(InputError):
    """torch.export could not turn the model into a graph."""


class ExportError(CaptureError):
    """torch.export itself gave up on the model."""


class CalibrationError(InputError):
    """Calibration data is missing, unreadable, of the wrong shape or dtype, or not finite."""


class RecipeError(InputError):
    """A recipe or a quantization option is invalid."""


class OutputError(InputError):
    """The output cannot be written."""


class PassError(RepQuantError):
    """A graph pass failed or left an illegal graph. Names the pass, and the passes that ran before it."""


class ParityError(RepQuantError):
    """ONNX Runtime and the FX reference disagree beyond float rounding."""

    exit_code = 3


class LostProcessError(RepQuantError):
    """Another of the processes that work together has ended, or does not answer."""

    exit_code = 2


class RepQuantWarning(UserWarning):
    """Something the user should know; the CLI shows these and hides the libraries' own."""


_OUT_OF_MEMORY = ("can't allocate memory", "annot allocate memory", "std::bad_alloc", "failed to map segment")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python or in a library."""
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError, ImportError)) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def is_failure(error: BaseException) -> bool:
    """Whether an error is the failure of a library: any Exception, and the panic of one written in Rust, which is
    none.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, shortened; its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
