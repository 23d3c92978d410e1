"""Efficient Channel Attention (ECA-Net, CVPR 2020): gates, networks, training and evidence.

Needs only torch and torchvision. The parts that need more (``ecanet.train``, ``ecanet.study``, ``ecanet.inspect``) are
imported when they are used, and say which ``pip install`` provides what is missing. ``import ecanet`` imports nothing
else, not even torch: what a name needs is imported when the name is first used.
"""

from typing import TYPE_CHECKING

from ecanet.lazy import lazy_names

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

_GATES = ("ECA", "ECANS", "SE", "SEGroup", "SEVar1", "SEVar2", "SEVar3", "adaptive_kernel_size", "fold_factors_")

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "inference": ("optimize_for_inference",),
        "nn": _GATES,
        "ops.backend": ("backend",),
        "surgery": ("fuse_tails_", "insert_gates_", "remove_gates_", "replace_gates_"),
    },
    ("inference", "inspect", "integrations", "models", "nn", "ops", "profile", "study", "surgery", "train"),
)
