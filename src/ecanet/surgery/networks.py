"""Networks of torchvision and timm by name."""

import difflib
import inspect
from typing import Any

import torchvision
from torch import nn

LIBRARIES = ("torchvision", "timm")


def create_network(name: str, num_classes: int | None = None) -> nn.Module:
    """Build a network of torchvision or timm, with random weights and without a download.

    Args:
        name: ``"torchvision/NAME"`` or ``"timm/NAME"``.
        num_classes: Classes of its head, by default the library's number.

    Raises:
        ImportError: a network of timm without timm installed.
        ValueError: no such network (the message names close ones), or ``num_classes`` is below 1.

    Example:
        >>> create_network("torchvision/resnet18", num_classes=10).fc.out_features
        10
    """
    library, _, short = name.partition("/")
    if library not in LIBRARIES or not short:
        raise ValueError(f"model must be torchvision/NAME or timm/NAME, such as torchvision/resnet50, got {name!r}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
    head = {} if num_classes is None else {"num_classes": num_classes}
    return _build_of_torchvision(short, head) if library == "torchvision" else _build_of_timm(short, head)


def default_input_shape(name: str, model: nn.Module) -> tuple[int, ...]:
    """Shape of one picture: as timm gives it for its networks, 224 x 224 pixels for torchvision's."""
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224)) if name.startswith("timm/") else None
    return (1, *(size or (3, 224, 224)))


def _build_of_torchvision(name: str, head: dict[str, Any]) -> nn.Module:
    known = torchvision.models.list_models()
    if name not in known:
        raise _unknown_name("torchvision", name, known)
    builder = torchvision.models.get_model_builder(name)
    # Without this argument a detector's builder downloads its backbone's weights.
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    return builder(weights=None, **backbone, **head)


def _build_of_timm(name: str, head: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm/{name} needs timm: pip install 'ecanet[timm]'") from error
    if not timm.is_model(name):
        raise _unknown_name("timm", name, timm.list_models())
    return timm.create_model(name, pretrained=False, **head)


def _unknown_name(library: str, name: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(name, known, 4, 0.5)
    listing = f"{'torchvision.models' if library == 'torchvision' else library}.list_models()"
    near = ", ".join(f"{library}/{other}" for other in close)
    return ValueError(f"model: {library} has no {name!r}; " + (f"close to it: {near}" if near else f"see {listing}"))
