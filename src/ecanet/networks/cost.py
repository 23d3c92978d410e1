"""What a model and its gates cost: parameters and multiply-adds."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ecanet.networks.checks import check_input_shape
from ecanet.networks.running import evaluating, example_tensor, gates, observing, without_hooks_on_all_modules
from ecanet.nn import Gate
from ecanet.ops import reference


def parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones count once, frozen ones count too.

    Example:
        >>> from ecanet.models import eca_resnet50
        >>> parameters(eca_resnet50(gate=None))
        25557032
    """
    return sum(parameter.numel() for parameter in model.parameters())


def gate_parameters(model: nn.Module) -> int:
    """Number of parameters inside the gates (subclasses of :class:`~ecanet.nn.Gate`); shared ones count once.

    Example:
        >>> from ecanet.models import eca_resnet50
        >>> gate_parameters(eca_resnet50(kernel_size="released"))
        80
    """
    return parameters(nn.ModuleList(gates(model).values()))


def multiply_adds(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of one forward pass in eval mode.

    What is counted:

    - convolutions, linear layers and matrix products: one per weight and position where it is used, zero padding
      included; this is half of what :class:`torch.utils.flop_counter.FlopCounterMode` counts;
    - C S for every gate on a map of C channels and S positions: per value, one addition in the squeeze and one
      multiplication in the scaling make one multiply-add;
    - inside the gates matrix products and element-wise products: k C for ECA and ECA-NS, C for SE-Var2, C^2 / G for
      SE-GC and SE-Var3, 2 C (C // r) for SE.

    Norms, activations, biases, pooling and the additions of residuals are not counted. The totals of the paper's
    Table 3 are 1 % (ResNet-50) to 11 % (MobileNetV2) higher, about what norms and activations would add. Its
    differences agree: over the blocks of MobileNetV2, C S adds up to 572,320, which is 0.55 of 2^20, and the paper
    reports 319.9M with ECA and 319.4M without.

    The model is left unchanged, with its modes, running statistics and hooks, and so are the random generators.

    Args:
        model: Takes one tensor; on any device, ``"meta"`` included. Must not be compiled or scripted.
        input_shape: Shape of the input, such as ``(1, 3, 224, 224)``; the count is for the whole batch.

    Raises:
        ValueError: ``input_shape`` has a size below 1, or a gate of the model does not run.
        TypeError: ``input_shape`` is not a sequence of integers.

    Example:
        >>> from ecanet.models import eca_mobilenet_v2
        >>> plain, eca = (eca_mobilenet_v2(gate, kernel_size=3) for gate in (None, "eca"))
        >>> multiply_adds(eca, (1, 3, 224, 224)) - multiply_adds(plain, (1, 3, 224, 224)) - 572_320  # 3 * sum of C
        4512
    """
    check_input_shape(input_shape)
    seen: list[tuple[Gate, torch.Size]] = []

    def see(_: str, gate: Gate, x: Tensor) -> None:
        seen.append((gate, x.shape))

    example = example_tensor(model)
    cuda_devices = [example.device] if example.device.type == "cuda" else []
    counter = FlopCounterMode(display=False)
    rng = torch.random.fork_rng(devices=cuda_devices)
    # The counter registers global hooks; with these in place, gates would call their layers.
    with rng, evaluating(model):
        with observing(model, see), counter, without_hooks_on_all_modules():
            model(example.new_zeros(input_shape))
        products = {gate: elementwise_products(gate) for gate, _ in seen}
    return counter.get_total_flops() // 2 + sum(shape.numel() + shape[0] * products[gate] for gate, shape in seen)


#: The operations that multiply element by element.
_PRODUCTS = (torch.ops.aten.mul, torch.ops.aten.mul_)


def elementwise_products(gate: Gate) -> int:
    """Multiply-adds per sample in a gate that are element-wise products, which the flop counter alone does not see."""
    if gate.maths() is None or type(gate).forward is not Gate.forward:  # its layers are called and counted
        return 0
    like = example_tensor(gate)
    means = torch.zeros(1, gate.channels, dtype=reference.accumulation_dtype(like.dtype), device=like.device)
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_PRODUCTS, _product))
    with torch.no_grad(), counter, without_hooks_on_all_modules():
        gate.gate(means)
    counts = counter.get_flop_counts().get("Global", {})
    return sum(counts.get(product, 0) for product in _PRODUCTS) // 2


def _product(a: Any, b: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Flops of a product from the shapes of its arguments; none if one of them is a number."""
    return 2 * math.prod(out_shape) if all(isinstance(shape, torch.Size) and shape for shape in (a, b)) else 0
