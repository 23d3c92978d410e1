"""Benchmarks on whole networks: ResNet-50 with ECA and without, at inference and in training."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import EcaModule
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, mobilenet_v2
from torchvision.models.resnet import Bottleneck, ResNet, resnet50, resnet101
from torchvision.ops import SqueezeExcitation

import ecanet
from benchmarks.cases import MEMORY_FORMATS, Case, SavedBytes, Work
from ecanet.profile.memory import bytes_kept
from ecanet.profile.turns import Competitor
from ecanet.profile.work import settle

_SHAPE, _QUICK_SHAPE = (8, 3, 224, 224), (2, 3, 64, 64)


class UsualBottleneck(Bottleneck):
    """torchvision's Bottleneck with a gate after the last norm, as it is usually added."""

    make_gate: Callable[[int], nn.Module]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eca = type(self).make_gate(self.conv3.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.eca(self.bn3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class TimmBottleneck(UsualBottleneck):
    """With timm's EcaModule."""

    make_gate = EcaModule


class SEBottleneck(UsualBottleneck):
    """With torchvision's squeeze-and-excitation, in plain PyTorch."""

    @staticmethod
    def make_gate(channels: int) -> nn.Module:
        """Reduction 16, as in the paper."""
        return SqueezeExcitation(channels, channels // 16)


def usual_mobilenet_v2(make_gate: Callable[[int], nn.Module]) -> nn.Module:
    """Torchvision's MobileNetV2 with a gate after the last norm of every inverted residual."""
    network = mobilenet_v2(weights=None)
    for block in network.modules():
        if isinstance(block, InvertedResidual):
            block.conv.append(make_gate(block.out_channels))
    return network


def _fused(network: nn.Module) -> nn.Module:
    ecanet.fuse_tails_(network)
    return network


#: Competitors by network; a new network is built for each case.
NETWORKS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    **{
        name: {
            "timm": partial(ResNet, TimmBottleneck, list(blocks)),
            "ecanet": ours,
            "no gate": plain,
            "SE": partial(ResNet, SEBottleneck, list(blocks)),
        }
        for name, blocks, ours, plain in (
            ("resnet50", (3, 4, 6, 3), ecanet.models.eca_resnet50, resnet50),
            ("resnet101", (3, 4, 23, 3), ecanet.models.eca_resnet101, resnet101),
        )
    },
    "mobilenet_v2": {
        "timm": partial(usual_mobilenet_v2, EcaModule),
        "ecanet": ecanet.models.eca_mobilenet_v2,
        "no gate": mobilenet_v2,
        "SE": partial(usual_mobilenet_v2, lambda channels: SqueezeExcitation(channels, max(1, channels // 8))),
    },
    # timm's own network, and the same on the fused tail
    "ecaresnet50d": {
        "timm": partial(timm.create_model, "ecaresnet50d"),
        "ecanet": lambda: _fused(timm.create_model("ecaresnet50d")),
        "no gate": partial(timm.create_model, "resnet50d"),
        "SE": partial(timm.create_model, "resnet50d", block_args={"attn_layer": "se"}),
    },
}


def network_cases(quick: bool, compiled: bool) -> Iterator[Case]:
    """Every case on networks on a CPU.

    Args:
        quick: Tiny images; nothing is compiled, which would take minutes.
        compiled: Whether the networks also compete under torch.compile.
    """
    shape = _QUICK_SHAPE if quick else _SHAPE
    compiled = compiled and not quick
    builders: dict[str, Callable[..., Work | SavedBytes]] = {
        "memory": _memory,
        "inference": partial(_inference, compiled),
        "training": partial(_training, compiled),
    }
    for name, build in builders.items():
        for memory_format in MEMORY_FORMATS:
            yield Case("network", name, shape, memory_format, partial(build, shape, memory_format))
    for name, build in (("inference", _surgery_inference), ("training", _surgery_training)):
        for memory_format in MEMORY_FORMATS:
            case = partial(build, quick, shape, memory_format)
            yield Case("surgery", f"ecaresnet50d-{name}", shape, memory_format, case)


def _example(shape: tuple[int, ...], memory_format: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=MEMORY_FORMATS[memory_format])
    return x, torch.randint(1000, shape[:1])


def _models(memory_format: str) -> dict[str, nn.Module]:
    """The networks, in training mode, with the same weights where they have the same layers."""
    torch.manual_seed(0)
    vanilla, ours, timm = resnet50(weights=None), ecanet.models.eca_resnet50(), ResNet(TimmBottleneck, [3, 4, 6, 3])
    ours.load_state_dict({**ours.state_dict(), **vanilla.state_dict()})
    timm.load_state_dict(ours.state_dict())
    models = {"timm": timm, "ecanet": ours, "no gate": vanilla}
    return {name: model.to(memory_format=MEMORY_FORMATS[memory_format]) for name, model in models.items()}


def _inference(compiled: bool, shape: tuple[int, ...], memory_format: str) -> Work:
    x, _ = _example(shape, memory_format)
    models = _models(memory_format)
    for name in ("timm", "no gate"):
        settle(models[name], x)
    models["ecanet"].load_state_dict(models["timm"].state_dict())
    for name in ("ecanet", "no gate"):
        models[f"{name} optimised"] = ecanet.optimize_for_inference(models[name].eval())
    calls: dict[str, Callable[..., Tensor]] = {name: model.eval() for name, model in models.items()}
    calls |= _compiled(models) if compiled else {}
    competitors = {name: Competitor(partial(call, x), torch.no_grad) for name, call in calls.items()}
    agree = tuple(tuple(n for n in calls if n.startswith("no gate") == without) for without in (False, True))
    return Work(competitors, agree, 1e-3)


def _step(call: Callable[..., Tensor], x: Tensor, target: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(call(x), target)
    loss.backward()
    optimizer.step()
    return loss


def _training(compiled: bool, shape: tuple[int, ...], memory_format: str) -> Work:
    x, target = _example(shape, memory_format)
    models = _models(memory_format)
    calls: dict[str, Callable[..., Tensor]] = dict(models)
    if compiled:
        models |= {f"{name} compiled": model for name, model in _models(memory_format).items() if name != "timm"}
        calls |= _compiled({name.removesuffix(" compiled"): m for name, m in models.items() if "compiled" in name})
    competitors = {
        name: Competitor(
            partial(_step, call, x, target, torch.optim.SGD(models[name].parameters(), lr=1e-3, momentum=0.9))
        )
        for name, call in calls.items()
    }
    agree = tuple(tuple(n for n in calls if n.startswith("no gate") == without) for without in (False, True))
    return Work(competitors, agree, 1e-3)


def _surgery_models(quick: bool, memory_format: str) -> dict[str, nn.Module]:
    """ECA-ResNet-50-D of timm, the same after :func:`ecanet.fuse_tails_`, and its backbone without a gate."""
    torch.manual_seed(0)
    plain, eca = ("resnet26d", "ecaresnet26t") if quick else ("resnet50d", "ecaresnet50d")
    models = {"timm": timm.create_model(eca), "ecanet": timm.create_model(eca), "no gate": timm.create_model(plain)}
    models["ecanet"].load_state_dict(models["timm"].state_dict())
    _fused(models["ecanet"])
    return {name: model.to(memory_format=MEMORY_FORMATS[memory_format]) for name, model in models.items()}


def _surgery_inference(quick: bool, shape: tuple[int, ...], memory_format: str) -> Work:
    x, _ = _example(shape, memory_format)
    models = _surgery_models(quick, memory_format)
    for name in ("timm", "no gate"):
        settle(models[name], x)
    models["ecanet"].load_state_dict(models["timm"].state_dict())
    competitors = {name: Competitor(partial(model.eval(), x), torch.no_grad) for name, model in models.items()}
    return Work(competitors, (("timm", "ecanet"),), 1e-3)


def _surgery_training(quick: bool, shape: tuple[int, ...], memory_format: str) -> Work:
    x, target = _example(shape, memory_format)
    competitors = {
        name: Competitor(partial(_step, model, x, target, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)))
        for name, model in _surgery_models(quick, memory_format).items()
    }
    return Work(competitors, (("timm", "ecanet"),), 1e-3)


def _compiled(models: dict[str, nn.Module]) -> dict[str, Callable[..., Tensor]]:
    """Ours and the one without a gate under torch.compile."""
    torch.compiler.reset()
    return {f"{name} compiled": torch.compile(models[name], dynamic=False) for name in ("ecanet", "no gate")}


def _memory(shape: tuple[int, ...], memory_format: str) -> SavedBytes:
    x, target = _example(shape, memory_format)
    models = _models(memory_format)
    return SavedBytes({name: partial(saved_bytes, model, x, target) for name, model in models.items()})


def saved_bytes(model: nn.Module, x: Tensor, target: Tensor) -> int:
    """Bytes that a training step keeps for its backward pass, without parameters and buffers; every storage once."""
    return bytes_kept(model, lambda: F.cross_entropy(model(x), target))
