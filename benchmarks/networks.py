"""What is measured on whole networks: ResNet-50 with ECA and without, at inference and in training."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import EcaModule
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models.resnet import Bottleneck, ResNet, resnet50

import ecanet
from benchmarks.cases import MEMORY_FORMATS, Case, SavedBytes, Work
from benchmarks.measure import Competitor

_SHAPE, _QUICK_SHAPE = (8, 3, 224, 224), (2, 3, 64, 64)


class TimmBottleneck(Bottleneck):
    """torchvision's Bottleneck with timm's EcaModule after the last norm: ECA as it is usually added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eca = EcaModule(self.conv3.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.eca(self.bn3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def network_cases(quick: bool) -> Iterator[Case]:
    """Every case on networks."""
    shape = _QUICK_SHAPE if quick else _SHAPE
    builders: dict[str, Callable[..., Work | SavedBytes]] = {
        "memory": _memory,
        "inference": _inference,
        "training": _training,
    }
    for name, build in builders.items():
        for memory_format in MEMORY_FORMATS:
            yield Case("network", name, shape, memory_format, partial(build, shape, memory_format))


def _example(shape: tuple[int, ...], memory_format: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=MEMORY_FORMATS[memory_format])
    return x, torch.randint(1000, shape[:1])


def _models(memory_format: str) -> dict[str, nn.Module]:
    """The networks, in training mode, with the same weights as far as they have the same layers."""
    torch.manual_seed(0)
    vanilla, ours, timm = resnet50(weights=None), ecanet.models.eca_resnet50(), ResNet(TimmBottleneck, [3, 4, 6, 3])
    ours.load_state_dict({**ours.state_dict(), **vanilla.state_dict()})
    timm.load_state_dict(ours.state_dict())
    models = {"timm": timm, "ecanet": ours, "no gate": vanilla}
    return {name: model.to(memory_format=MEMORY_FORMATS[memory_format]) for name, model in models.items()}


@torch.no_grad()
def _settle(model: nn.Module, x: Tensor) -> None:
    """Set the running statistics to those of x: activations of a trained network's size, no denormal numbers."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model(x)
    for norm in norms:
        norm.momentum = 0.1


def _inference(shape: tuple[int, ...], memory_format: str) -> Work:
    x, _ = _example(shape, memory_format)
    models = _models(memory_format)
    for name in ("timm", "no gate"):
        _settle(models[name], x)
    models["ecanet"].load_state_dict(models["timm"].state_dict())
    for name in ("ecanet", "no gate"):
        models[f"{name} optimised"] = ecanet.optimize_for_inference(models[name].eval())
    competitors = {name: Competitor(partial(model.eval(), x), torch.no_grad) for name, model in models.items()}
    agree = (("timm", "ecanet", "ecanet optimised"), ("no gate", "no gate optimised"))
    return Work(competitors, agree, 1e-3)


def _training(shape: tuple[int, ...], memory_format: str) -> Work:
    x, target = _example(shape, memory_format)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    competitors = {
        name: Competitor(partial(step, model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)))
        for name, model in _models(memory_format).items()
    }
    return Work(competitors, (("timm", "ecanet"),), 1e-3)


def _memory(shape: tuple[int, ...], memory_format: str) -> SavedBytes:
    x, target = _example(shape, memory_format)
    models = _models(memory_format)
    return SavedBytes({name: partial(saved_bytes, model, x, target) for name, model in models.items()})


def saved_bytes(model: nn.Module, x: Tensor, target: Tensor) -> int:
    """Bytes that a training step keeps for its backward pass, without parameters and buffers; every storage once."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def see(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(see, lambda t: t):
        loss = F.cross_entropy(model(x), target)  # the graph keeps every storage, so no address comes twice
        assert loss.requires_grad
    return sum(found.values())
