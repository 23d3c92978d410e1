"""What is measured: a training step, and a call at inference."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecanet.profile.turns import Competitor

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Set the norms' running statistics to those of x, so that activations are as large as in a trained network.

    Without this, activations may become denormal numbers, which are slow.
    """
    momenta = {module: module.momentum for module in model.modules() if isinstance(module, _BATCH_NORMS)}
    for norm in momenta:
        norm.momentum = 1.0
    model(x)
    for norm, momentum in momenta.items():
        norm.momentum = momentum


def loss_of(output: object, labels: Tensor) -> Tensor:
    """Cross entropy of logits ``(N, K)``; for any other output the sum of the mean squares of its tensors.

    Raises:
        ValueError: the output holds no floating-point tensor that depends on a parameter.
    """
    if isinstance(output, Tensor) and output.ndim == 2:
        return F.cross_entropy(output, labels % output.shape[1])
    means = [t.float().square().mean() for t in _tensors_in(output) if t.is_floating_point() and t.requires_grad]
    if not means:
        raise ValueError("the network returns no floating-point tensor that requires a gradient")
    return torch.stack(means).sum()


def _tensors_in(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors_in(value)


def training(network: nn.Module, images: Tensor, labels: Tensor, rate: float = 1e-4) -> Competitor:
    """A training step: forward, loss, backward, SGD with momentum. Gradients are freed at its end.

    Args:
        network: The network; each step changes its weights.
        images: ``(N, 3, H, W)``.
        labels: ``(N,)``.
        rate: Learning rate.
    """
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9)

    def step() -> None:
        loss_of(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Competitor(step, partial(_in_mode, network, True))


def inference(network: nn.Module, images: Tensor) -> Competitor:
    """A call in eval mode without gradients; images ``(N, 3, H, W)``."""

    def call() -> None:
        network(images)

    return Competitor(call, partial(_in_mode, network, False))


@contextmanager
def _in_mode(network: nn.Module, train: bool) -> Iterator[None]:
    network.train(train)
    with torch.set_grad_enabled(train):
        yield
