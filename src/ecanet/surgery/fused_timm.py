"""timm's blocks on the fused tail: the modules, keys and values of the classes they derive from."""

from typing import Any

from timm.models import _efficientnet_blocks, regnet, resnet
from torch import Tensor, nn

from ecanet.nn import conv_norm_gate_add_act, norm_gate_add_act


def _end(
    block: nn.Module,
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: Any = None,
) -> Tensor:
    """Convolution, norm, gate, addition and activation, with what is dropped at random between them."""
    drop = getattr(block, "drop_path", None)
    if residual is None or drop is None or isinstance(drop, nn.Identity) or not block.training:
        return conv_norm_gate_add_act(x, conv, norm, gate, residual, act)
    x = drop(norm_gate_add_act(conv(x), norm, gate)) + residual
    return x if act is None else act(x)


class FusedBasicBlock(resnet.BasicBlock):
    """The block of ResNet-18 and 34."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = self.drop_block(norm_gate_add_act(self.conv1(x), self.bn1))
        out = self.aa(self.act1(out))  # type: ignore[misc]
        shortcut = x if self.downsample is None else self.downsample(x)
        return _end(self, out, self.conv2, self.bn2, self.se, shortcut, self.act2)


class FusedBottleneck(resnet.Bottleneck):
    """The block of ResNet-50 and deeper, ResNeXt, ECA-ResNet, SE-ResNet."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = norm_gate_add_act(self.conv1(x), self.bn1, act=self.act1)
        out = self.conv2(out)
        if isinstance(self.drop_block, nn.Identity):
            out = norm_gate_add_act(out, self.bn2, act=self.act2)
        else:
            out = self.act2(self.drop_block(self.bn2(out)))
        out = self.aa(out)  # type: ignore[misc]
        shortcut = x if self.downsample is None else self.downsample(x)
        return _end(self, out, self.conv3, self.bn3, self.se, shortcut, self.act3)


class FusedRegNetBottleneck(regnet.Bottleneck):
    """RegNet's block."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = self.se(self.conv2(self.conv1(x)))
        residual = None if self.downsample is None else self.downsample(x)
        return _end(self, out, self.conv3.conv, self.conv3.bn, None, residual, self.act3)


class FusedDepthwiseSeparableConv(_efficientnet_blocks.DepthwiseSeparableConv):
    """The first block of MobileNet and EfficientNet."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = x
        if self.conv_s2d is not None:
            out = self.bn_s2d(self.conv_s2d(out))
        out = self.se(self.aa(self.bn1(self.conv_dw(out))))  # type: ignore[misc]
        return _end(self, out, self.conv_pw, self.bn2, None, x if self.has_skip else None)


class FusedInvertedResidual(_efficientnet_blocks.InvertedResidual):
    """The inverted residual of MobileNet and EfficientNet."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = x
        if self.conv_s2d is not None:
            out = self.bn_s2d(self.conv_s2d(out))
        out = self.bn2(self.conv_dw(self.bn1(self.conv_pw(out))))
        out = self.se(self.aa(out))  # type: ignore[misc]
        return _end(self, out, self.conv_pwl, self.bn3, None, x if self.has_skip else None)


class FusedEdgeResidual(_efficientnet_blocks.EdgeResidual):
    """The fused inverted residual of EfficientNetV2's early stages."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = self.se(self.aa(self.bn1(self.conv_exp(x))))  # type: ignore[misc]
        return _end(self, out, self.conv_pwl, self.bn2, None, x if self.has_skip else None)
