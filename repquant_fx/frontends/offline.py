"""transformers without a network, and without its log."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from repquant_fx.errors import ModelFileError


def library() -> Any:
    """transformers.

    Raises:
        ModelFileError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelFileError("transformers models need transformers: pip install 'repquant-fx[language]'") from error
    return transformers


@contextmanager
def quiet_offline() -> Iterator[None]:
    """No network, no progress bars and no log of transformers while a directory is read."""
    import huggingface_hub.constants as constants
    from transformers.utils import logging as library_log

    was_offline, level, bars = (
        constants.HF_HUB_OFFLINE,
        library_log.get_verbosity(),
        library_log.is_progress_bar_enabled(),
    )
    constants.HF_HUB_OFFLINE = True
    library_log.set_verbosity(logging.CRITICAL)
    library_log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        library_log.set_verbosity(level)
        if bars:
            library_log.enable_progress_bar()
