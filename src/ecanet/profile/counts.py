"""What is counted, without a clock: parameters and multiply-adds, also as the paper's authors counted."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.networks.cost import multiply_adds, parameters
from ecanet.nn import Gate
from ecanet.profile.subjects import Subject, attention_in

#: What networks raise on pictures that do not suit them.
FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)


@dataclass(frozen=True)
class Counts:
    """What a network has and computes.

    Attributes:
        parameters: All of them, shared ones once.
        gate_parameters: Those in its channel attention.
        multiply_adds: For one picture: :func:`ecanet.inspect.multiply_adds`, half of what torch's counter says.
        paper_flops: For one picture, by the rule behind the paper's Table 3. The authors' script calls the package
            thop, which then counted, beside multiply-adds, 4 operations for every value that a BatchNorm reads
            (subtract, divide, scale, shift), 1 for every value that a ReLU reads, and the additions of linear layers
            apart from their multiplications.

    Source:
        GitHub ``BangguWu/ECANet``, ``paras_flops.py``; GitHub ``Lyken17/pytorch-OpCounter``, ``thop/count_hooks.py`` of
        2019.
    """

    parameters: int
    gate_parameters: int
    multiply_adds: int
    paper_flops: int


def count(subject: Subject, image_size: int) -> Counts:
    """Count a network, without memory for its values where it can be built and run so.

    Raises:
        ValueError: it does not run on pictures ``(1, 3, image_size, image_size)``; the message says what torch said.
    """
    shape = (1, 3, image_size, image_size)
    if not subject.values_matter:
        try:
            with torch.device("meta"):
                return _counts(subject.build(), shape)
        except FAULTS:  # it needs values, as torchvision's RegNets and detectors do, or it does not run at all
            pass
    try:
        return _counts(subject.build(), shape)
    except FAULTS as error:
        raise ValueError(f"{subject.name} does not run on pictures of shape {shape}: {first_words(error)}") from error


def first_words(error: Exception) -> str:
    """What an error says, in one line that is not long."""
    return " ".join(str(error).split())[:300]


def _counts(network: nn.Module, shape: tuple[int, ...]) -> Counts:
    attention = attention_in(network)
    others = [module for module in attention if not isinstance(module, Gate)]
    with _operations_beside(network) as beside:
        work = multiply_adds(network, shape, others)
    return Counts(parameters(network), parameters(nn.ModuleList(attention)), work, work + beside())


@contextmanager
def _operations_beside(network: nn.Module) -> Iterator[Callable[[], int]]:
    """What the paper's count has beside multiply-adds, of the passes that run inside."""
    more = 0

    def see(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
        nonlocal more
        if isinstance(module, nn.Linear):
            more += (module.in_features - 1) * out.numel()
        else:
            more += (1 if isinstance(module, (nn.ReLU, nn.ReLU6)) else 4) * arguments[0].numel()

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.ReLU6, nn.Linear)
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, kinds):
                stack.callback(module.register_forward_hook(see).remove)
        yield lambda: more
