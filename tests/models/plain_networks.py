"""The networks written a second time, from the paper and on torchvision alone: nothing here comes from ecanet."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

# Kernel sizes of the released weights (paper.md); MobileNetV2 has one for each block, 1 below 96 channels.
RELEASED = {
    "resnet18": [3, 5, 7, 7],
    "resnet34": [3, 3, 5, 7],
    "resnet50": [3, 5, 5, 7],
    "resnet101": [3, 3, 5, 7],
    "resnet152": [3, 3, 5, 7],
}


class EcaLayer(nn.Module):
    """Eq. (9): sigmoid of a 1-D convolution over the channel means, times the input."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))  # (N, C)
        gates = torch.sigmoid(self.conv(means[:, None])[:, 0])
        return x * gates[:, :, None, None]


def randomise_(model: nn.Module) -> nn.Module:
    """Give every norm statistics and affine parameters of its own, as training does."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def plain(backbone: str, **kwargs) -> nn.Module:
    """torchvision's network with the norms of a trained one."""
    return randomise_(torchvision.models.get_model(backbone, weights=None, **kwargs))


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Residual blocks by name, in forward order."""
    for name, module in model.named_modules():
        if isinstance(module, BasicBlock | Bottleneck | InvertedResidual):
            yield name, module


def with_eca(backbone: str, kernel_sizes: list[int] | None = None, **kwargs) -> nn.Module:
    """torchvision's network with an ECA layer after the last norm of every block, under the official names.

    ``kernel_sizes`` has one entry a stage; without it they are those of the released weights.
    """
    model = plain(backbone, **kwargs)
    for name, block in blocks(model):
        if isinstance(block, InvertedResidual):
            block.conv.append(EcaLayer(1 if block.out_channels < 96 else 3))
        else:
            stage = int(name[len("layer")]) - 1
            block.eca = EcaLayer((kernel_sizes or RELEASED[backbone])[stage])
            last_norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            last_norm.register_forward_hook(lambda _module, _input, out, eca=block.eca: eca(out))
    return model


def save_as_released(model: nn.Module, path: Path, prefix: str = "module.", **changes) -> Path:
    """Write a checkpoint as the official training script does: nested, DataParallel's prefix, an optimizer's state."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    checkpoint = {
        "epoch": 100,
        "arch": "eca_resnet50",
        "state_dict": {prefix + key: value for key, value in model.state_dict().items()},
        "best_prec1": torch.tensor(77.42),
        "optimizer": optimizer.state_dict(),
    }
    torch.save({**checkpoint, **changes}, path)
    return path


def relative_difference(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()
