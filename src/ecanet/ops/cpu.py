"""Loads the library of C++ kernels, or knows why it is not there."""

import torch

from ecanet.ops.build import LIBRARY, is_current

_reason: str | None = "the C++ kernels are not loaded: import ecanet.ops"


def load() -> None:
    """Load the library. Where that cannot be done, :func:`why_not` says why; nothing is raised or printed."""
    global _reason
    _reason = _try_to_load()


def why_not() -> str | None:
    """None if the kernels are loaded, otherwise one line that says why not and what to do."""
    return _reason


def _try_to_load() -> str | None:
    if not LIBRARY.is_file():
        return "the C++ kernels are not built; to build them: ecanet build"
    try:
        if not is_current(LIBRARY):
            return "the C++ kernels are built from other sources; to build them again: ecanet build"
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        said = str(error.__cause__ or error).splitlines()[0]
        return f"the C++ kernels cannot be loaded ({said}); to build them again: ecanet build"
    return None
