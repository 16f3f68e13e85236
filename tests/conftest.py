"""Shared fixtures: tiny models, captured and canonicalized once a session."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable

import pytest
import torch
from helpers import Encoder, canonical, images, redraw, sequences, swin, vit
from torch.fx import GraphModule

os.environ.setdefault("REPQUANT_FX_DEBUG", "1")  # every contract of every pass is checked

# a job in the background ignores some signals, and so would every process that a test starts
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _copies(graph_module: GraphModule) -> Callable[[], GraphModule]:
    return lambda: copy.deepcopy(graph_module)


@pytest.fixture(scope="session")
def vit_graph() -> Callable[[], GraphModule]:
    """Gives fresh copies of a canonical two-block ViT."""
    return _copies(canonical(vit(), images()))


@pytest.fixture(scope="session")
def swin_graph() -> Callable[[], GraphModule]:
    """Gives fresh copies of a canonical Swin of two stages, one shifted window among its blocks."""
    return _copies(canonical(swin(), images()))


@pytest.fixture(scope="session")
def encoder_graph() -> Callable[[], GraphModule]:
    """Gives fresh copies of a canonical one-block encoder with separate q, k, v."""
    return _copies(canonical(redraw(Encoder()), sequences()))
