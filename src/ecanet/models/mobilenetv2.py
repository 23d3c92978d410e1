"""ECA-MobileNetV2, based on torchvision's class, with any gate or none."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2

from ecanet.models.hub import HubModel
from ecanet.models.plain import PlainWeights, load_plain_weights
from ecanet.models.stages import KernelSizes, kernel_sizes_per_stage
from ecanet.nn.build import GateSpec, build_gate, gate_name
from ecanet.nn.hooks import called_differently
from ecanet.nn.se import SE
from ecanet.nn.tail.functional import conv_norm_gate_add_act

#: Inverted residuals in each of the seven stages of torchvision's default setting.
BLOCKS_PER_STAGE = (1, 2, 3, 4, 3, 3, 1)


class GatedInvertedResidual(InvertedResidual):
    """torchvision's InvertedResidual with an optional gate after the last norm, at the end of ``conv``."""

    has_gate = False

    def append_gate(self, gate: nn.Module) -> None:
        """Put the gate after the last norm."""
        self.conv.append(gate)
        self.has_gate = True

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        if called_differently(self.conv):
            return super().forward(x)
        layers = list(self.conv)
        gate = layers.pop() if self.has_gate else None
        norm = layers.pop()
        conv = layers.pop()
        out = x
        for layer in layers:
            out = layer(out)
        return conv_norm_gate_add_act(out, conv, norm, gate, x if self.use_res_connect else None)


class ECAMobileNetV2(HubModel, MobileNetV2):
    """torchvision's MobileNetV2 with a gate after the linear projection's norm of every inverted residual.

    Keys are torchvision's; the gate is the last entry of each block's ``conv`` sequence (``features.N.conv.M``), as in
    the official checkpoints.

    Args:
        gate: A name in :data:`ecanet.nn.GATES`, a class or function of the number of channels, or None for none.
            ``"se"`` and the class ``SE`` have reduction 8 here, as in the paper. ``"se_gc1"`` and ``"se_gc2"`` need
            multiples of 16 channels, but the second stage has 24.
        kernel_size: For gates that have one: ``"adaptive"`` (Eq. 12), ``"released"`` (as in the released weights), an
            odd integer, or one for each of the 7 stages. Ignored without a gate.
        num_classes: Outputs of the classifier.
        width_mult: Multiplies the channels of every layer.
        dropout: Dropout before the classifier.
        neutral: As in :class:`~ecanet.models.ECAResNet`.
        factor: As in :class:`~ecanet.models.ECAResNet`.
        fold: As in :class:`~ecanet.models.ECAResNet`.
        norm_layer: torchvision's.

    Shape:
        Input ``(N, 3, H, W)``, output ``(N, num_classes)``.

    Raises:
        TypeError: ``gate`` does not return a module.
        ValueError: ``gate`` or ``kernel_size`` is unknown, the gate cannot have the channels of a stage, it cannot be
            ``neutral``, or ``factor`` is not the one that ``neutral`` needs.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151; Sandler et al., arXiv:1801.04381.

    Example:
        >>> model = ECAMobileNetV2(kernel_size="released")
        >>> sum(gate.conv.weight.numel() for _, gate in model.gated_norms())
        31
    """

    backbone = "mobilenet_v2"  # torchvision's name
    #: Prefix of the classifier's keys.
    classifier_name = "classifier.1"
    features: nn.Sequential
    classifier: nn.Sequential
    last_channel: int

    def __init__(
        self,
        gate: GateSpec = "eca",
        *,
        kernel_size: KernelSizes = "adaptive",
        num_classes: int = 1000,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        neutral: bool = False,
        factor: float | None = None,
        fold: bool = False,
        norm_layer: Any = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            width_mult=width_mult,
            dropout=dropout,
            norm_layer=norm_layer,
            block=GatedInvertedResidual,
        )
        self.config = {
            "gate": gate_name(gate),
            "kernel_size": kernel_size,
            "num_classes": num_classes,
            "width_mult": width_mult,
            "dropout": dropout,
            "neutral": neutral,
            "factor": factor,
            "fold": fold,
            "norm_layer": norm_layer,
        }
        sizes = kernel_sizes_per_stage(kernel_size, len(BLOCKS_PER_STAGE), self.backbone)
        sizes_per_block = [size for size, blocks in zip(sizes, BLOCKS_PER_STAGE, strict=True) for _ in range(blocks)]
        if gate is not None:
            factory = partial(SE, reduction=8) if gate_name(gate) == "se" else gate
            number = 1.0 if factor is None else factor
            for block, size in zip(self._blocks(), sizes_per_block, strict=True):
                block.append_gate(build_gate(factory, block.out_channels, size, number))
        self._has_gates = gate is not None
        self._start_gates()

    def _blocks(self) -> Iterator[GatedInvertedResidual]:
        return (module for module in self.features if isinstance(module, GatedInvertedResidual))

    def gated_norms(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Pairs of a norm and the gate that scales its output, in forward order."""
        if self._has_gates:
            for block in self._blocks():
                yield block.conv[-2], block.conv[-1]


def eca_mobilenet_v2(gate: GateSpec = "eca", *, weights: PlainWeights | None = None, **kwargs: Any) -> ECAMobileNetV2:
    """ECA-MobileNetV2.

    Args:
        gate: A name in :data:`ecanet.nn.GATES`, a class or function of the number of channels, or None for none.
        weights: A **plain** MobileNetV2's weights, loaded without changing the function that it computes:
            see :func:`ecanet.models.load_plain_weights`.
        kwargs: ``kernel_size``, ``num_classes``, ``width_mult``, ``dropout``, ``neutral``, ``factor``, ``fold``: see
            :class:`ECAMobileNetV2`.

    Raises:
        TypeError, ValueError: as :class:`ECAMobileNetV2` and :func:`ecanet.models.load_plain_weights`.

    Example:
        >>> model = eca_mobilenet_v2(gate="se", num_classes=10)
    """
    model = ECAMobileNetV2(gate, **kwargs)
    if weights is not None:
        load_plain_weights(model, weights, fold=model.config["fold"])
    return model
