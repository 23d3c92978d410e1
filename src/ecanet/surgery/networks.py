"""Networks of torchvision and timm by name, and their trained weights."""

import difflib
import functools
import importlib.util
import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from ecanet.files.state_dicts import read_state_dict
from ecanet.models.plain import named_weights
from ecanet.untrusted import listed, shown

LIBRARIES = ("torchvision", "timm")


def is_of_a_library(name: str) -> bool:
    """Whether a name has the form ``torchvision/NAME`` or ``timm/NAME``."""
    library, _, short = name.partition("/")
    return library in LIBRARIES and bool(short)


def check_network_name(name: str) -> None:
    """Raise unless a network of torchvision or timm has this name.

    Raises:
        ImportError: a network of timm without timm installed.
        ValueError: no such network; the message names close ones.
    """
    library, _, short = name.partition("/")
    if not is_of_a_library(name):
        raise ValueError(f"model must be torchvision/NAME or timm/NAME, such as torchvision/resnet50, got {name!r}")
    if library == "torchvision":
        if short not in (known := torchvision.models.list_models()):
            raise _unknown_name(library, short, known)
        return
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{name} needs timm: pip install 'ecanet[timm]'") from error
    if not timm.is_model(short):
        raise _unknown_name(library, short, timm.list_models())
    try:
        timm.models.get_pretrained_cfg(short)
    except RuntimeError as error:  # a name may end in .TAG, which names trained weights
        arch = f"timm/{short.partition('.')[0]}"
        tags = listed(weights_names(arch)) or "none"
        raise ValueError(f"model: {arch} has no weights with the tag of {shown(name)!r}, but {tags}") from error


def has_timm() -> bool:
    """Whether timm is installed."""
    return importlib.util.find_spec("timm") is not None


def known_networks() -> list[str]:
    """``torchvision/NAME`` and, with timm installed, ``timm/NAME`` of each network.

    Example:
        >>> "torchvision/resnet18" in known_networks()
        True
    """
    names = [f"torchvision/{name}" for name in torchvision.models.list_models()]
    if has_timm():
        import timm

        # Importing ecanet.models registers its own networks with timm.
        own = set(timm.list_models(module="timm_models"))
        names += [f"timm/{name}" for name in timm.list_models() if name not in own]
    return names


def classifies_pictures(name: str) -> bool:
    """Whether a network, ``torchvision/NAME`` or ``timm/NAME``, has pictures as input and classes as output."""
    library, _, short = name.partition("/")
    models = torchvision.models
    return library == "timm" or short in (*models.list_models(models), *models.list_models(models.quantization))


def weights_names(name: str) -> list[str]:
    """Names of the trained weights that a library has for a network, its default first.

    Args:
        name: ``torchvision/NAME`` or ``timm/NAME``.

    Example:
        >>> weights_names("torchvision/resnet50")
        ['IMAGENET1K_V2', 'IMAGENET1K_V1']
    """
    library, _, short = name.partition("/")
    if library == "torchvision":
        enum: Any = torchvision.models.get_model_weights(short)
        names = [entry.name for entry in enum]
        default = [enum["DEFAULT"].name] if "DEFAULT" in enum.__members__ else []
    else:
        import timm

        arch = short.partition(".")[0]
        names = _tags_of_timm().get(arch, [])
        config = timm.models.get_pretrained_cfg(arch, allow_unregistered=True)
        default = [config.tag] if config is not None and config.tag in names else []
    return [*default, *(each for each in names if each not in default)]


@functools.cache
def _tags_of_timm() -> dict[str, list[str]]:
    import timm

    tags: dict[str, list[str]] = {}
    for full in timm.list_pretrained():
        arch, _, tag = full.partition(".")
        tags.setdefault(arch, []).append(tag)
    return tags


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
    check_network_name(name)
    library, _, short = name.partition("/")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
    head: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if library == "timm":
        import timm

        return timm.create_model(short, pretrained=False, **head)
    builder = torchvision.models.get_model_builder(short)
    # Without this argument a detector's builder downloads its backbone's weights.
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    with warnings.catch_warnings():  # two of them warn that a later version may draw other initial weights
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        return builder(weights=None, **backbone, **head)


def trained_weights(name: str, weights: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of trained weights.

    Args:
        name: ``"torchvision/NAME"`` or ``"timm/NAME"``; or a name of something else, for which only a file will do.
        weights: A file; or the library's name for them, as :func:`weights_names` lists it, or ``"DEFAULT"``, which the
            library downloads unless it has them.

    Raises:
        OSError: no such file, or the library cannot download them.
        ValueError: neither a file nor such a name, or the file is damaged.
    """
    if not isinstance(weights, str) or Path(weights).exists() or Path(weights).suffix:
        return read_state_dict(weights)
    library, _, short = name.partition("/")
    if library == "torchvision":
        return named_weights(short, weights)
    tags = weights_names(name) if library == "timm" else []
    if not tags or weights not in (*tags, "DEFAULT"):
        raise ValueError(
            f"weights={shown(weights)!r} is neither a file nor a name of weights for {name}: "
            f"{listed(tags) or 'there are none'}"
        )
    import timm

    tagged = short if weights == "DEFAULT" else f"{short.partition('.')[0]}.{weights}"
    try:
        return dict(timm.create_model(tagged, pretrained=True).state_dict())
    except Exception as error:  # each library involved raises its own kind, and not all are OSErrors
        raise OSError(
            f"weights={weights!r} of {name} could not be downloaded ({type(error).__name__}: {shown(error, 200)}): "
            "without a network, pass a file's path"
        ) from error


def default_input_shape(name: str, model: nn.Module) -> tuple[int, ...]:
    """Shape of one picture: as timm gives it for its networks, 224 x 224 pixels for torchvision's."""
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224)) if name.startswith("timm/") else None
    return (1, *(size or (3, 224, 224)))


def _unknown_name(library: str, name: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(name, known, 4, 0.5)
    near = ", ".join(f"{library}/{other}" for other in close)
    return ValueError(
        f"model: {library} has no {shown(name)!r}; " + (f"close to it: {near}" if near else "see ecanet list")
    )
