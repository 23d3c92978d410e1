"""ECA-ResNet-18 to 152 and a small ResNet for small images, based on torchvision's blocks, with any gate or none."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ecanet.models.hub import HubModel
from ecanet.models.plain import PlainWeights, load_plain_weights
from ecanet.models.stages import KernelSizes, kernel_sizes_per_stage
from ecanet.nn.build import GateSpec, build_gate, gate_name
from ecanet.nn.tail.functional import conv_norm_gate_add_act, norm_gate_add_act


class GatedBasicBlock(BasicBlock):
    """torchvision's BasicBlock with an optional gate after the last norm, before the addition.

    Every kind of gate is called ``eca``, so that the official checkpoints' keys fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("eca", None)

    @property
    def last_norm(self) -> nn.Module:
        """The norm whose output the gate scales."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = norm_gate_add_act(self.conv1(x), self.bn1, act=self.relu)
        return norm_gate_add_act(self.conv2(out), self.bn2, self.eca, _residual(self, x), self.relu)


class GatedBottleneck(Bottleneck):
    """torchvision's Bottleneck with an optional gate after the last norm, before the addition."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("eca", None)

    @property
    def last_norm(self) -> nn.Module:
        """The norm whose output the gate scales."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = norm_gate_add_act(self.conv1(x), self.bn1, act=self.relu)
        out = norm_gate_add_act(self.conv2(out), self.bn2, act=self.relu)
        return conv_norm_gate_add_act(out, self.conv3, self.bn3, self.eca, _residual(self, x), self.relu)


def _residual(block: GatedBasicBlock | GatedBottleneck, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def _add_gates(
    stages: Sequence[nn.Sequential],
    widths: Sequence[int],
    gate: GateSpec,
    kernel_size: KernelSizes,
    factor: float,
    backbone: str,
) -> None:
    sizes = kernel_sizes_per_stage(kernel_size, len(stages), backbone)
    if gate is None:
        return
    for stage, channels, size in zip(stages, widths, sizes, strict=True):
        for block in stage:
            block.eca = build_gate(gate, channels, size, factor)


class _GatedStages(HubModel):
    """What the ResNets share: gates in the blocks of stages."""

    stage_names: ClassVar[tuple[str, ...]]
    #: Prefix of the classifier's keys.
    classifier_name = "fc"

    def gated_norms(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Pairs of a norm and the gate that scales its output, in forward order."""
        for name in self.stage_names:
            for block in getattr(self, name):
                if block.eca is not None:
                    yield block.last_norm, block.eca


class ECAResNet(_GatedStages, ResNet):
    """torchvision's ResNet with a gate in every block, after the last norm and before the addition.

    Keys are torchvision's, plus ``layerX.Y.eca.*`` for the gates: those of the official checkpoints.

    Args:
        depth: 18, 34, 50, 101 or 152.
        gate: A name in :data:`ecanet.nn.GATES`, a class or function of the number of channels, or None for none.
        kernel_size: For gates that have one: ``"adaptive"`` (Eq. 12), ``"released"`` (as in the released weights), an
            odd integer, or one for each of the 4 stages. Ignored without a gate.
        num_classes: Outputs of the classifier.
        neutral: Start as the plain network, with gates that are 1 (with factor 2 for gates that end in a sigmoid).
            Plain state dicts then load strictly, and the network computes what the plain one does.
        factor: Multiplies every gate value; by default 1, or with ``neutral`` the factor that it needs.
        fold: Fold the gates' factors into the norms before them: :func:`ecanet.fold_factors_`.
        kwargs: torchvision's: ``zero_init_residual``, ``groups``, ``width_per_group``,
            ``replace_stride_with_dilation``, ``norm_layer``.

    Shape:
        Input ``(N, 3, H, W)``, output ``(N, num_classes)``.

    Raises:
        TypeError: ``gate`` does not return a module.
        ValueError: ``depth``, ``gate`` or ``kernel_size`` is unknown, the gate cannot be ``neutral``, or ``factor`` is
            not the one that ``neutral`` needs.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151; He et al., arXiv:1512.03385 (stride in the 3 x 3
        convolution, as in torchvision and the official code).

    Example:
        >>> model = ECAResNet(18, num_classes=10)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    conv1: nn.Conv2d
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential
    avgpool: nn.Module
    fc: nn.Module

    stage_names = ("layer1", "layer2", "layer3", "layer4")
    _layouts: ClassVar[dict[int, tuple[type[BasicBlock] | type[Bottleneck], list[int]]]] = {
        18: (GatedBasicBlock, [2, 2, 2, 2]),
        34: (GatedBasicBlock, [3, 4, 6, 3]),
        50: (GatedBottleneck, [3, 4, 6, 3]),
        101: (GatedBottleneck, [3, 4, 23, 3]),
        152: (GatedBottleneck, [3, 8, 36, 3]),
    }

    def __init__(
        self,
        depth: int = 50,
        gate: GateSpec = "eca",
        *,
        kernel_size: KernelSizes = "adaptive",
        num_classes: int = 1000,
        neutral: bool = False,
        factor: float | None = None,
        fold: bool = False,
        **kwargs: Any,
    ) -> None:
        if depth not in self._layouts:
            raise ValueError(f"depth must be one of {sorted(self._layouts)}, got {depth!r}")
        block, layers = self._layouts[depth]
        super().__init__(block, layers, num_classes=num_classes, **kwargs)
        self.backbone = f"resnet{depth}"  # torchvision's name
        self.config = {
            "depth": depth,
            "gate": gate_name(gate),
            "kernel_size": kernel_size,
            "num_classes": num_classes,
            "neutral": neutral,
            "factor": factor,
            "fold": fold,
            **kwargs,
        }
        stages = [getattr(self, name) for name in self.stage_names]
        widths = [width * block.expansion for width in (64, 128, 256, 512)]
        _add_gates(stages, widths, gate, kernel_size, 1.0 if factor is None else factor, self.backbone)
        self._start_gates()


class SmallECAResNet(_GatedStages):
    """A ResNet of basic blocks for small images such as 28 x 28, for demonstrations and quick studies.

    Args:
        gate: As in :class:`ECAResNet`.
        kernel_size: As in :class:`ECAResNet`, with one for each of its stages; there are no released kernels.
        num_classes: Outputs of the classifier.
        widths: Channels of each stage; every stage after the first halves the resolution.
        blocks: Blocks per stage.
        stem_stride: Stride of the first convolution: 2 takes a quarter of the time on 28 x 28 pictures.
        neutral: As in :class:`ECAResNet`.
        factor: As in :class:`ECAResNet`.
        fold: As in :class:`ECAResNet`.

    Shape:
        Input ``(N, 3, H, W)``, output ``(N, num_classes)``.

    Raises:
        TypeError: ``gate`` does not return a module.
        ValueError: ``gate`` or ``kernel_size`` is unknown, ``widths`` is empty, ``blocks`` < 1, the gate cannot be
            ``neutral``, or ``factor`` is not the one that ``neutral`` needs.

    Source:
        The layout for CIFAR of He et al., arXiv:1512.03385, Section 4.2.

    Example:
        >>> SmallECAResNet(num_classes=10)(torch.randn(2, 3, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        gate: GateSpec = "eca",
        *,
        kernel_size: KernelSizes = "adaptive",
        num_classes: int = 10,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int = 1,
        stem_stride: int = 1,
        neutral: bool = False,
        factor: float | None = None,
        fold: bool = False,
    ) -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths must name the channels of at least one stage, got none: try (32, 64, 128)")
        if blocks < 1:
            raise ValueError(f"blocks must be 1 or more, got {blocks}")
        self.backbone = "small_resnet"
        self.config = {
            "gate": gate_name(gate),
            "kernel_size": kernel_size,
            "num_classes": num_classes,
            "widths": list(widths),
            "blocks": blocks,
            "stem_stride": stem_stride,
            "neutral": neutral,
            "factor": factor,
            "fold": fold,
        }
        self.conv1 = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.stage_names = tuple(f"layer{i}" for i in range(1, len(widths) + 1))  # type: ignore[misc]
        stages = []
        for i, (name, width) in enumerate(zip(self.stage_names, widths, strict=True)):
            in_width, stride = (widths[0], 1) if i == 0 else (widths[i - 1], 2)
            downsample = None
            if stride != 1 or in_width != width:
                downsample = nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            first = GatedBasicBlock(in_width, width, stride, downsample)
            stages.append(nn.Sequential(first, *(GatedBasicBlock(width, width) for _ in range(1, blocks))))
            self.add_module(name, stages[-1])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Gates come after the backbone, so that a seed gives the same backbone with any gate.
        _add_gates(stages, widths, gate, kernel_size, 1.0 if factor is None else factor, self.backbone)
        self._start_gates()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N, num_classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _resnet(depth: int, weights: PlainWeights | None, gate: GateSpec, kwargs: dict[str, Any]) -> ECAResNet:
    model = ECAResNet(depth, gate, **kwargs)
    if weights is not None:
        load_plain_weights(model, weights, fold=model.config["fold"])
    return model


def eca_resnet18(gate: GateSpec = "eca", *, weights: PlainWeights | None = None, **kwargs: Any) -> ECAResNet:
    """ECA-ResNet-18: arguments as in :func:`eca_resnet50`."""
    return _resnet(18, weights, gate, kwargs)


def eca_resnet34(gate: GateSpec = "eca", *, weights: PlainWeights | None = None, **kwargs: Any) -> ECAResNet:
    """ECA-ResNet-34: arguments as in :func:`eca_resnet50`."""
    return _resnet(34, weights, gate, kwargs)


def eca_resnet50(gate: GateSpec = "eca", *, weights: PlainWeights | None = None, **kwargs: Any) -> ECAResNet:
    """ECA-ResNet-50.

    Args:
        gate: A name in :data:`ecanet.nn.GATES`, a class or function of the number of channels, or None for none.
        weights: A **plain** network's weights, loaded without changing the function that it computes:
            see :func:`ecanet.models.load_plain_weights`. For the authors' ECA weights use
            :func:`ecanet.models.load_official`.
        kwargs: ``kernel_size``, ``num_classes``, ``neutral``, ``factor``, ``fold`` and torchvision's: see
            :class:`ECAResNet`.

    Raises:
        TypeError, ValueError: as :class:`ECAResNet` and :func:`ecanet.models.load_plain_weights`.

    Example:
        >>> model = eca_resnet50(kernel_size="released")
        >>> sum(p.numel() for name, p in model.named_parameters() if ".eca." in name)
        80
    """
    return _resnet(50, weights, gate, kwargs)


def eca_resnet101(gate: GateSpec = "eca", *, weights: PlainWeights | None = None, **kwargs: Any) -> ECAResNet:
    """ECA-ResNet-101: arguments as in :func:`eca_resnet50`."""
    return _resnet(101, weights, gate, kwargs)


def eca_resnet152(gate: GateSpec = "eca", *, weights: PlainWeights | None = None, **kwargs: Any) -> ECAResNet:
    """ECA-ResNet-152: arguments as in :func:`eca_resnet50`."""
    return _resnet(152, weights, gate, kwargs)


def small_eca_resnet(gate: GateSpec = "eca", *, weights: PlainWeights | None = None, **kwargs: Any) -> SmallECAResNet:
    """A small ResNet for small images.

    Args:
        gate: As in :func:`eca_resnet50`.
        weights: A plain small ResNet's state dict or file, loaded without changing the function.
        kwargs: See :class:`SmallECAResNet`.

    Example:
        >>> small_eca_resnet(None).config["gate"] is None
        True
    """
    model = SmallECAResNet(gate, **kwargs)
    if weights is not None:
        load_plain_weights(model, weights, fold=model.config["fold"])
    return model
