"""What a gate costs in a training step: parameters, multiply-adds, and time measured in turns."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ecanet.inspect import gate_parameters, multiply_adds
from ecanet.profile.measure import step_seconds, threads_of_torch


@dataclass
class Cost:
    """What one training step of a condition costs.

    Attributes:
        parameters: Parameters of its gates.
        multiply_adds: Multiply-adds of the gates for one image.
        seconds: Median time of a training step (forward, backward, SGD) on one thread.
    """

    parameters: int
    multiply_adds: int
    seconds: float


def measure_costs(
    networks: Mapping[str, nn.Module], image_size: int = 28, batch_size: int = 128, rounds: int = 20, classes: int = 10
) -> dict[str, Cost]:
    """Measure the parameters, multiply-adds and time that gates add to a network.

    The networks take turns, one training step in each round, in one process on one thread, so that other load on the
    machine affects all of them. Compare these times only with one another.

    Args:
        networks: Networks by name; the first one, without gates, is what the others are compared with. A few training
            steps change their weights: pass copies.
        image_size: Height and width of the input, in pixels.
        batch_size: Images in a step.
        rounds: Timed steps of each network, after warm-up steps.
        classes: Number of classes of the networks.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    labels = torch.randint(classes, (batch_size,), generator=generator)
    with threads_of_torch(1):
        seconds = step_seconds(networks, images, labels, rounds, rate=0.01)
    shape = (1, 3, image_size, image_size)
    work = {name: multiply_adds(network, shape) for name, network in networks.items()}
    plain = next(iter(work.values()))
    return {
        name: Cost(gate_parameters(network), work[name] - plain, statistics.median(seconds[name]))
        for name, network in networks.items()
    }
