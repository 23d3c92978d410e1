"""Efficient Channel Attention (ECA-Net, CVPR 2020): gates, networks, training and evidence.

Needs torch and torchvision alone; the parts that need more (``ecanet.train``, ``ecanet.study``, ``ecanet.inspect``)
are imported where they are used and say which ``pip install`` brings what is missing. ``import ecanet`` imports nothing
else, not even torch: what a name needs is imported when the name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecanet import models, nn
    from ecanet.inference import optimize_for_inference
    from ecanet.nn import ECA, ECANS, SE, SEGroup, SEVar1, SEVar2, SEVar3, adaptive_kernel_size, fold_factors_
    from ecanet.ops.backend import backend
    from ecanet.surgery import fuse_tails_, insert_gates_, remove_gates_, replace_gates_

__version__ = "0.1.0"

__all__ = [
    "ECA",
    "ECANS",
    "SE",
    "SEGroup",
    "SEVar1",
    "SEVar2",
    "SEVar3",
    "__version__",
    "adaptive_kernel_size",
    "backend",
    "fold_factors_",
    "fuse_tails_",
    "insert_gates_",
    "models",
    "nn",
    "optimize_for_inference",
    "remove_gates_",
    "replace_gates_",
]

#: Where a name is that is no module of this package.
_FOUND_IN = {
    **dict.fromkeys(
        ("ECA", "ECANS", "SE", "SEGroup", "SEVar1", "SEVar2", "SEVar3", "adaptive_kernel_size", "fold_factors_"),
        "ecanet.nn",
    ),
    **dict.fromkeys(("fuse_tails_", "insert_gates_", "remove_gates_", "replace_gates_"), "ecanet.surgery"),
    "backend": "ecanet.ops.backend",
    "optimize_for_inference": "ecanet.inference",
}
_MODULES = ("inference", "inspect", "integrations", "models", "nn", "ops", "study", "surgery", "train")


def __getattr__(name: str) -> Any:
    """Import what a public name needs, the first time that it is used (PEP 562)."""
    if name in _FOUND_IN:
        value = getattr(importlib.import_module(_FOUND_IN[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"ecanet.{name}")
    else:
        raise AttributeError(f"module 'ecanet' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, whether used already or not."""
    return sorted({*globals(), *__all__, *_MODULES})
