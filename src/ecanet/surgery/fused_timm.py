"""timm's blocks on the fused tail: subclasses with the same modules, keys and values."""

from typing import Any

from timm.layers import ConvNormAct, DropPath
from timm.models import _efficientnet_blocks, regnet, resnet
from torch import Tensor, nn

from ecanet.nn import conv_norm_gate_add_act, norm_gate_add_act
from ecanet.nn.hooks import called_differently, is_identity


def _run_end(
    block: nn.Module,
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: Any = None,
) -> Tensor:
    """Convolution, norm, gate, stochastic depth, addition and activation."""
    drop = getattr(block, "drop_path", None)
    if residual is None or drop is None or _drops_nothing(drop):
        return conv_norm_gate_add_act(x, conv, norm, gate, residual, act)
    x = drop(norm_gate_add_act(conv(x), norm, gate)) + residual
    return x if act is None else act(x)


def _drops_nothing(drop: nn.Module) -> bool:
    inactive = type(drop) is DropPath and not (drop.training and drop.drop_prob) and not called_differently(drop)
    return inactive or is_identity(drop)


class FusedBasicBlock(resnet.BasicBlock):
    """The block of ResNet-18 and 34."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = self.drop_block(norm_gate_add_act(self.conv1(x), self.bn1))
        out = self.aa(self.act1(out))  # type: ignore[misc]
        shortcut = x if self.downsample is None else self.downsample(x)
        return _run_end(self, out, self.conv2, self.bn2, self.se, shortcut, self.act2)


class FusedBottleneck(resnet.Bottleneck):
    """The block of ResNet-50 and deeper, ResNeXt, ECA-ResNet, SE-ResNet."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = norm_gate_add_act(self.conv1(x), self.bn1, act=self.act1)
        out = self.conv2(out)
        if is_identity(self.drop_block):
            out = norm_gate_add_act(out, self.bn2, act=self.act2)
        else:
            out = self.act2(self.drop_block(self.bn2(out)))
        out = self.aa(out)  # type: ignore[misc]
        shortcut = x if self.downsample is None else self.downsample(x)
        return _run_end(self, out, self.conv3, self.bn3, self.se, shortcut, self.act3)


class FusedRegNetBottleneck(regnet.Bottleneck):
    """RegNet's block."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        last = self.conv3
        if type(last) is not ConvNormAct or called_differently(last) or not is_identity(getattr(last, "aa", None)):
            return super().forward(x)
        out = self.se(self.conv2(self.conv1(x)))
        residual = None if self.downsample is None else self.downsample(x)
        return _run_end(self, out, last.conv, last.bn, None, residual, self.act3)


class FusedDepthwiseSeparableConv(_efficientnet_blocks.DepthwiseSeparableConv):
    """The first block of MobileNet and EfficientNet."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = x
        if self.conv_s2d is not None:
            out = self.bn_s2d(self.conv_s2d(out))
        out = self.se(self.aa(self.bn1(self.conv_dw(out))))  # type: ignore[misc]
        return _run_end(self, out, self.conv_pw, self.bn2, None, x if self.has_skip else None)


class FusedInvertedResidual(_efficientnet_blocks.InvertedResidual):
    """The inverted residual of MobileNet and EfficientNet."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = x
        if self.conv_s2d is not None:
            out = self.bn_s2d(self.conv_s2d(out))
        out = self.bn2(self.conv_dw(self.bn1(self.conv_pw(out))))
        out = self.se(self.aa(out))  # type: ignore[misc]
        return _run_end(self, out, self.conv_pwl, self.bn3, None, x if self.has_skip else None)


class FusedEdgeResidual(_efficientnet_blocks.EdgeResidual):
    """The fused inverted residual of EfficientNetV2's early stages."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = self.se(self.aa(self.bn1(self.conv_exp(x))))  # type: ignore[misc]
        return _run_end(self, out, self.conv_pwl, self.bn2, None, x if self.has_skip else None)
