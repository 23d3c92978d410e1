"""A block on the fused tail honours every module that its class calls: hooks fire, gates scale, other modules run."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import efficientnet, mobilenetv2, mobilenetv3, regnet, resnet

from ecanet import fuse_tails_
from ecanet.nn import SEVar1
from ecanet.nn.attached import CONTAINERS, attach_, attached_gate
from ecanet.surgery import FUSED

C = 16


def of_timm() -> dict[str, Callable[[], nn.Module]]:
    timm = pytest.importorskip("timm")
    from timm.layers import DropBlock2d
    from timm.models import _efficientnet_blocks as blocks
    from timm.models import regnet as timm_regnet
    from timm.models import resnet as timm_resnet

    se = timm.layers.SEModule
    down = lambda: nn.Sequential(nn.Conv2d(C, 4 * C, 1, bias=False), nn.BatchNorm2d(4 * C))  # noqa: E731
    return {
        "timm BasicBlock": lambda: timm_resnet.BasicBlock(C, C, attn_layer=se),
        "timm BasicBlock, stochastic depth": lambda: timm_resnet.BasicBlock(C, C, drop_path=timm.layers.DropPath(0.5)),
        "timm Bottleneck": lambda: timm_resnet.Bottleneck(C, C, downsample=down()),
        "timm Bottleneck, ECA and drops": lambda: timm_resnet.Bottleneck(
            4 * C, C, attn_layer="eca", drop_block=partial(DropBlock2d, 0.5, 3), drop_path=timm.layers.DropPath(0.5)
        ),
        "timm RegNet": lambda: timm_regnet.Bottleneck(C, C, group_size=8, se_ratio=0.25, downsample="conv1x1"),
        "timm RegNet, stochastic depth": lambda: timm_regnet.Bottleneck(
            C, 2 * C, group_size=8, downsample="conv1x1", drop_path_rate=0.5
        ),
        "timm DepthwiseSeparableConv": lambda: blocks.DepthwiseSeparableConv(C, C, se_layer=blocks.SqueezeExcite),
        "timm InvertedResidual": lambda: blocks.InvertedResidual(C, C, exp_ratio=2, drop_path_rate=0.5),
        "timm EdgeResidual": lambda: blocks.EdgeResidual(C, C, exp_ratio=2, drop_path_rate=0.5),
    }


def of_torchvision() -> dict[str, Callable[[], nn.Module]]:
    mnv3 = mobilenetv3.InvertedResidualConfig(C, 3, 2 * C, C, True, "RE", 1, 1, 1)
    mbconv = efficientnet.MBConvConfig(2, 3, 1, C, C, 1)
    fused = efficientnet.FusedMBConvConfig(2, 3, 1, C, C, 1)
    return {
        "BasicBlock": lambda: resnet.BasicBlock(C, C),
        "Bottleneck": lambda: resnet.Bottleneck(4 * C, C),
        "InvertedResidual of V2": lambda: mobilenetv2.InvertedResidual(C, C, 1, 2),
        "RegNet": lambda: regnet.ResBottleneckBlock(C, 2 * C, 1, nn.BatchNorm2d, nn.ReLU, 8, 1.0, 0.25),
        "InvertedResidual of V3": lambda: mobilenetv3.InvertedResidual(mnv3, nn.BatchNorm2d),
        "MBConv": lambda: efficientnet.MBConv(mbconv, 0.5, nn.BatchNorm2d),
        "FusedMBConv": lambda: efficientnet.FusedMBConv(fused, 0.5, nn.BatchNorm2d),
    }


BLOCKS = [
    *of_torchvision(),
    "timm BasicBlock",
    "timm BasicBlock, stochastic depth",
    "timm Bottleneck",
    "timm Bottleneck, ECA and drops",
    "timm RegNet",
    "timm RegNet, stochastic depth",
    "timm DepthwiseSeparableConv",
    "timm InvertedResidual",
    "timm EdgeResidual",
]
every_block = pytest.mark.parametrize("name", BLOCKS)


def block_and_input(name: str, training: bool = False) -> tuple[nn.Module, Tensor]:
    block = (of_timm() if name.startswith("timm") else of_torchvision())[name]().double().train(training)
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return block, torch.randn(2, channels, 6, 6, dtype=torch.float64)


def parts(block: nn.Module) -> list[str]:
    return [name for name, _ in block.named_modules() if name]


def assert_alike(got: nn.Module, want: nn.Module, x: Tensor, what: str) -> None:
    torch.manual_seed(1)
    y = got(x.clone())
    torch.manual_seed(1)
    torch.testing.assert_close(y, want(x.clone()), rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


def test_every_class_is_here() -> None:
    for name in ("torchvision", "timm"):
        makers = of_timm() if name == "timm" else of_torchvision()
        tested = {f"{type(b).__module__}.{type(b).__qualname__}" for b in (make() for make in makers.values())}
        assert {cls for cls in FUSED if cls.startswith(name)} <= tested


@every_block
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_hooks_on_every_module_fire_as_often(name, training) -> None:
    block, x = block_and_input(name, training)
    calls: list[list[str]] = []
    for fuse in (False, True):
        for part in ["", *parts(block)]:
            seen: list[str] = []
            copied = nn.Sequential(copy.deepcopy(block))
            if fuse:
                fuse_tails_(copied)
            # Of timm's attention a gate may have taken the place; its layers keep their names.
            module = dict(copied[0].named_modules()).get(part)
            if module is None:
                continue
            module.register_forward_hook(lambda m, a, y, seen=seen: seen.append("forward"))
            module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append("pre"))
            torch.manual_seed(1)
            copied(x)
            calls.append([part, *seen])
        if not fuse:
            wanted, calls = {part: seen for part, *seen in calls}, []
    assert calls
    for part, *seen in calls:
        assert seen == wanted[part], part


def doubled(host: nn.Module) -> None:
    host.register_forward_hook(lambda module, args, out: 2 * out)


def gated(host: nn.Module) -> None:
    attach_(host, SEVar1(channels(host)).double())


def channels(host: Any) -> int:
    return host.channels_seen


@every_block
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("change", [doubled, gated])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_gate_on_any_module_scales(name, training, change, before) -> None:
    block, x = block_and_input(name, training)
    seen: dict[str, set[int]] = {}
    probe = copy.deepcopy(block)
    for part, module in probe.named_modules():
        module.register_forward_hook(lambda m, a, y, part=part: seen.setdefault(part, set()).add(y.shape[1]) or y)
    probe(x.clone())
    shapes = {part: min(sizes) for part, sizes in seen.items() if len(sizes) == 1}  # one ReLU may see several
    tried = 0
    for part in parts(block):
        host = block.get_submodule(part)
        if part not in shapes or (change is gated and (isinstance(host, CONTAINERS) or hasattr(host, "gate"))):
            continue
        want, got = copy.deepcopy(block), nn.Sequential(copy.deepcopy(block))
        if not before:
            fuse_tails_(got)
        if (target := dict(got[0].named_modules()).get(part)) is None or hasattr(target, "gate") != hasattr(
            host, "gate"
        ):
            continue
        for module in (want.get_submodule(part), target):
            module.channels_seen = shapes[part]
            change(module)
        if before:
            fuse_tails_(got)
        tried += 1
        assert_alike(got, want, x, part)
    assert tried >= 4


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


@every_block
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_modules_that_somebody_put_in_place_of_others_run(name, training) -> None:
    block, x = block_and_input(name, training)
    tried = 0
    for part in parts(block):
        if any(isinstance(module, nn.Conv2d) for module in block.get_submodule(part).modules()):
            continue
        want, got = copy.deepcopy(block), nn.Sequential(copy.deepcopy(block))
        fuse_tails_(got)
        if part not in dict(got[0].named_modules()):
            continue
        for model in (want, got[0]):
            parent, _, child = part.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, Half()) if not child.isdigit() else owner.__setitem__(int(child), Half())
        tried += 1
        assert_alike(got, want, x, part)
    assert tried >= 3


def test_a_gate_that_hangs_stays_when_its_block_is_fused() -> None:
    block, _ = block_and_input("BasicBlock")
    attach_(block.bn2, SEVar1(C))
    fuse_tails_(nn.Sequential(block))
    assert attached_gate(block.bn2) is not None
