"""What can be counted without a clock: parameters and multiply-adds, also by the rule of the paper's authors."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.networks.cost import multiply_adds, parameters
from ecanet.nn import Gate
from ecanet.profile.subjects import Subject, attention_modules

#: Exceptions that networks raise on pictures of an unsuitable size or shape.
INPUT_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)


@dataclass(frozen=True)
class Counts:
    """What a network has and computes.

    Attributes:
        parameters: Number of all parameters; shared ones count once.
        gate_parameters: Number of the parameters in its channel attention.
        multiply_adds: Multiply-adds for one picture by :func:`ecanet.inspect.multiply_adds`, which is half of what
            torch's counter gives.
        paper_flops: FLOPs for one picture, by the rule behind the paper's Table 3. The authors' script calls the
            package thop, which at that time counted multiply-adds and also 4 operations for every value that a
            BatchNorm reads (subtract, divide, scale, shift), 1 for every value that a ReLU reads, and the additions of
            linear layers separately from their multiplications.

    Source:
        GitHub ``BangguWu/ECANet``, ``paras_flops.py``; GitHub ``Lyken17/pytorch-OpCounter``, ``thop/count_hooks.py`` of
        2019.
    """

    parameters: int
    gate_parameters: int
    multiply_adds: int
    paper_flops: int


def count(subject: Subject, image_size: int) -> Counts:
    """Count a network. If it can be built and run on the meta device, no memory is used for its values.

    Raises:
        ValueError: it does not run on pictures ``(1, 3, image_size, image_size)``; the message holds that of torch.
    """
    shape = (1, 3, image_size, image_size)
    if not subject.values_matter:
        try:
            with torch.device("meta"):
                return _counts(subject.build(), shape)
        except INPUT_ERRORS:  # it needs values, as torchvision's RegNets and detectors do, or it does not run at all
            pass
    try:
        return _counts(subject.build(), shape)
    except INPUT_ERRORS as error:
        raise ValueError(f"{subject.name} does not run on pictures of shape {shape}: {first_words(error)}") from error


def first_words(error: Exception) -> str:
    """The message of an error in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def _counts(network: nn.Module, shape: tuple[int, ...]) -> Counts:
    attention = attention_modules(network)
    others = [module for module in attention if not isinstance(module, Gate)]
    with _extra_operations(network) as extra:
        work = multiply_adds(network, shape, others)
    return Counts(parameters(network), parameters(nn.ModuleList(attention)), work, work + extra())


@contextmanager
def _extra_operations(network: nn.Module) -> Iterator[Callable[[], int]]:
    """Count what the paper's rule adds to multiply-adds in the forward passes inside the context."""
    extra = 0

    def add(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
        nonlocal extra
        if isinstance(module, nn.Linear):
            extra += (module.in_features - 1) * out.numel()
        else:
            extra += (1 if isinstance(module, (nn.ReLU, nn.ReLU6)) else 4) * arguments[0].numel()

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.ReLU6, nn.Linear)
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, kinds):
                stack.callback(module.register_forward_hook(add).remove)
        yield lambda: extra
