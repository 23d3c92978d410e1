"""torchvision's blocks on the fused tail: subclasses with the same modules, keys and values."""

from typing import Any

from torch import Tensor, nn
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.ops import StochasticDepth

from ecanet.nn import conv_norm_gate_add_act
from ecanet.nn.hooks import called_differently, is_identity
from ecanet.nn.norms import is_norm


def _conv_and_norm_at_end(*sequences: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Convolution and norm at the end of nested sequences, the outermost first; None if they are anything else."""
    last = list(sequences[-1]._modules.values())
    if any(called_differently(s) or not isinstance(s, nn.Sequential) for s in sequences):
        return None
    if len(last) != 2 or last[0] is None or last[1] is None or not is_norm(last[1]):
        return None
    return last[0], last[1]


class FusedResBottleneckBlock(ResBottleneckBlock):
    """RegNet's block."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        *layers, last = self.f
        end = _conv_and_norm_at_end(self.f, last)
        if end is None:
            return super().forward(x)
        residual = x if self.proj is None else self.proj(x)
        for layer in layers:
            x = layer(x)
        return conv_norm_gate_add_act(x, *end, None, residual, self.activation)


def _fused_output(block: Any, x: Tensor) -> Tensor | None:
    """An inverted residual's output, computed by the fused tail; None if the block must run its own code."""
    *layers, last = block.block
    end = _conv_and_norm_at_end(block.block, last)
    if end is None or not _drops_nothing(getattr(block, "stochastic_depth", None)):
        return None
    residual = x if block.use_res_connect else None
    for layer in layers:
        x = layer(x)
    return conv_norm_gate_add_act(x, *end, None, residual)


def _drops_nothing(depth: Any) -> bool:
    if type(depth) is not StochasticDepth:
        return is_identity(depth)
    return not (depth.training and depth.p) and not called_differently(depth)


class FusedInvertedResidual(InvertedResidual):
    """MobileNetV3's block."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = _fused_output(self, input)
        return super().forward(input) if out is None else out


class FusedMBConvTail(MBConv):
    """EfficientNet's block; in training with stochastic depth it runs its own code."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = _fused_output(self, input)
        return super().forward(input) if out is None else out


class FusedMBConvV2Tail(FusedMBConv):
    """EfficientNetV2's block of early stages; in training with stochastic depth it runs its own code."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        out = _fused_output(self, input)
        return super().forward(input) if out is None else out
