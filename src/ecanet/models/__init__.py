"""Networks with a gate in every block, based on torchvision's classes, and functions that load weights into them."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from ecanet.files.state_dicts import read_state_dict
from ecanet.models.hub import HubModel
from ecanet.models.mobilenetv2 import ECAMobileNetV2, eca_mobilenet_v2
from ecanet.models.official import load_official
from ecanet.models.plain import load_plain_weights
from ecanet.models.resnet import (
    ECAResNet,
    SmallECAResNet,
    eca_resnet18,
    eca_resnet34,
    eca_resnet50,
    eca_resnet101,
    eca_resnet152,
    small_eca_resnet,
)
from ecanet.models.stages import KernelSizes

#: Every network by the name of its function.
MODELS: dict[str, Callable[..., ECAResNet | ECAMobileNetV2 | SmallECAResNet]] = {
    "eca_resnet18": eca_resnet18,
    "eca_resnet34": eca_resnet34,
    "eca_resnet50": eca_resnet50,
    "eca_resnet101": eca_resnet101,
    "eca_resnet152": eca_resnet152,
    "eca_mobilenet_v2": eca_mobilenet_v2,
    "small_eca_resnet": small_eca_resnet,
}


def build_model(name: str, **kwargs: Any) -> ECAResNet | ECAMobileNetV2 | SmallECAResNet:
    """Build a network by name.

    Args:
        name: A key of :data:`MODELS`.
        kwargs: Arguments of that function.

    Raises:
        ValueError: unknown name.

    Example:
        >>> build_model("small_eca_resnet", gate="se").fc.out_features
        10
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](**kwargs)


# With timm installed, importing this package registers the networks, so that timm finds them by name.
if importlib.util.find_spec("timm") is not None:
    try:
        import ecanet.models.timm_models  # noqa: F401
    except Exception as error:
        warnings.warn(
            f"ecanet's networks are not registered with timm, which cannot be imported or is too old ({error!r}): "
            "pip install --upgrade timm",
            stacklevel=2,
        )

__all__ = [
    "MODELS",
    "ECAMobileNetV2",
    "ECAResNet",
    "HubModel",
    "KernelSizes",
    "SmallECAResNet",
    "build_model",
    "eca_mobilenet_v2",
    "eca_resnet18",
    "eca_resnet34",
    "eca_resnet50",
    "eca_resnet101",
    "eca_resnet152",
    "load_official",
    "load_plain_weights",
    "read_state_dict",
    "small_eca_resnet",
]
