"""Networks to do surgery on, and what tests ask of them."""

import copy
import functools
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ecanet import insert_gates_
from ecanet.nn import GATES, build_gate


class NarrowResNet(ResNet):
    """Torchvision's, no stage wider than 128: gates have the kernel sizes of a ResNet-18, weights are a sixth."""

    def __init__(self, block: Any, blocks: list[int], num_classes: int = 1000) -> None:
        super().__init__(block, blocks)
        self.fc = nn.Linear(128 * block.expansion, num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, min(planes, 128), *args, **kwargs)


NARROW = {"narrow/resnet18": (BasicBlock, [2, 2, 2, 2]), "narrow/resnet50": (Bottleneck, [3, 4, 6, 3])}


#: Gates that can start neutral. One without weights, as SE-Var1, has nothing that could be set to 0.
GATES_WITH_WEIGHTS = [name for name in GATES if any(True for _ in build_gate(name, 64).parameters())]


def build(name: str) -> nn.Module:
    """A network with norms, biases and scales as training leaves them, in eval mode.

    Args:
        name: ``torchvision/NAME``, ``timm/NAME``, or of :data:`NARROW`: a :class:`NarrowResNet` with its blocks.
    """
    source, _, model_name = name.partition("/")
    if name in NARROW:
        model = NarrowResNet(*NARROW[name])
    elif model_name == "vgg11_bn":  # whose classifier has 124 of its 133 million weights
        with torch.device("meta"):
            model = torchvision.models.vgg11_bn()
        model.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
        model.classifier = nn.Linear(512 * 7 * 7, 10)
    else:
        create = torchvision.models.get_model if source == "torchvision" else timm.create_model
        model = create(model_name)
    return randomise_(model).eval()


def resnet18() -> nn.Module:
    return build("narrow/resnet18")


@functools.cache
def _gated_resnet18() -> nn.Module:
    model = resnet18()
    insert_gates_(model)
    return model


def gated_resnet18() -> nn.Module:
    """With ECA in its blocks: a copy, since insertion takes longer than most of what tests do with it."""
    return copy.deepcopy(_gated_resnet18())


@torch.no_grad()
def randomise_(model: nn.Module) -> nn.Module:
    """Give vectors (norms, biases, layer scales) and running statistics values of their own."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


def images(size: int = 64, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random pictures."""
    return torch.randn(batch, 3, size, size, dtype=dtype)


def relative_difference(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got - want).norm() / want.norm()).item()


def assert_same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same keys in the same order, and the same bits."""
    assert list(got) == list(want)
    for key, value in want.items():
        assert torch.equal(got[key], value), key
