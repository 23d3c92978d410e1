"""What a model and its gates cost: parameters and multiply-adds."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ecanet.networks.checks import check_input_shape
from ecanet.networks.running import evaluating, example_tensor, gates, observing, without_hooks_on_all_modules
from ecanet.ops.backend import backend


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


def multiply_adds(model: nn.Module, input_shape: Sequence[int], others: Sequence[nn.Module] = ()) -> int:
    """Multiply-adds of one forward pass in eval mode.

    What is counted:

    - convolutions, linear layers and matrix products: one per weight and position where it is used, zero padding
      included; this is half of what :class:`torch.utils.flop_counter.FlopCounterMode` counts;
    - inside the gates, besides these, one for every value of a product of two tensors, of a square, and of a map whose
      variance is found. On a map of C channels and S positions, every gate scales C S values (per value, one addition
      in the squeeze and one multiplication in the scaling make one multiply-add), and a gate that sees variances also
      squares C S values. ECA and ECA-NS add k C, SE-Var2 C, SE-GC and SE-Var3 C^2 / G, SE 2 C (C // r), SRM and GRN
      2 C, GCT 4 C.

    Norms, activations, biases, pooling and the additions of residuals are not counted. The totals of the paper's Table
    3 are 1 % (ResNet-50) to 11 % (MobileNetV2) higher, because its rule counts norms and activations, too
    (:class:`ecanet.profile.Counts`). Its differences agree: over the blocks of MobileNetV2, C S adds up to 572,320,
    which is 0.55 of 2^20, and the paper reports 319.9M with ECA and 319.4M without.

    The model is left unchanged, with its modes, running statistics and hooks, and so are the random generators.

    Args:
        model: Takes one tensor; on any device, ``"meta"`` included. Must not be compiled or scripted.
        input_shape: Shape of the input, such as ``(1, 3, 224, 224)``; the count is for the whole batch.
        others: Modules of the model that are counted as gates are, such as another library's attention.

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
    example = example_tensor(model)
    cuda_devices = [example.device] if example.device.type == "cuda" else []
    rng = torch.random.fork_rng(devices=cuda_devices)
    # The counter registers global hooks; with these in place, gates would call their layers.
    with rng, evaluating(model), counting(model, others) as counter, counter, without_hooks_on_all_modules():
        model(example.new_zeros(input_shape))
    return counter.get_total_flops() // 2


@contextmanager
def counting(model: nn.Module, others: Sequence[nn.Module] = ()) -> Iterator[FlopCounterMode]:
    """Yield a counter that also counts products inside gates and ``others``; gates run in plain PyTorch.

    Raises:
        ValueError: a gate never ran.
    """
    running: list[nn.Module] = []

    def leave(*_: Any) -> None:
        running.pop()

    def inside_gates(products: _Products) -> Callable[..., int]:
        return lambda *shapes, out_shape, **_: 2 * products(shapes, out_shape) if running else 0

    mapping = {operation: inside_gates(products) for operation, products in _PRODUCTS.items()}
    with ExitStack() as stack:
        stack.enter_context(backend("reference"))
        stack.enter_context(observing(model, leave))
        for module in (*gates(model).values(), *others):
            stack.callback(module.register_forward_pre_hook(lambda module, _: running.append(module)).remove)
        for module in others:
            stack.callback(module.register_forward_hook(leave).remove)
        yield FlopCounterMode(display=False, custom_mapping=mapping)


def _of_two_tensors(shapes: Sequence[Any], out: Any) -> int:
    return math.prod(out) if all(isinstance(shape, torch.Size) and len(shape) for shape in shapes[:2]) else 0


def _of_the_map(shapes: Sequence[Any], _: Any) -> int:
    return math.prod(shapes[0])


#: Number of products of an operation, from its arguments (tensors as their shapes) and the shape of its result.
_Products = Callable[[Sequence[Any], Any], int]
_PRODUCTS: dict[Any, _Products] = {
    torch.ops.aten.mul: _of_two_tensors,
    torch.ops.aten.mul_: _of_two_tensors,
    torch.ops.aten.pow: lambda arguments, out: math.prod(out) if arguments[1] == 2 else 0,
    torch.ops.aten.var: _of_the_map,
    torch.ops.aten.var_mean: _of_the_map,
}
