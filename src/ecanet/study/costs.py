"""What a gate costs in a training step: parameters, multiply-adds, and time measured in turns."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ecanet.inspect import gate_parameters, multiply_adds


@dataclass
class Cost:
    """What one training step of an entry costs.

    Attributes:
        parameters: Parameters of its gates.
        multiply_adds: Multiply-adds of the gates for one image.
        seconds: Median time of a training step (forward, backward, SGD) on one thread.
    """

    parameters: int
    multiply_adds: int
    seconds: float


def measure_costs(
    networks: Mapping[str, nn.Module],
    image_size: int = 28,
    batch_size: int = 128,
    rounds: int = 20,
    classes: int = 10,
) -> dict[str, Cost]:
    """Parameters, multiply-adds and time that gates add to a network.

    The networks take turns, one training step in each round, in one process on one thread, so that other load on the
    machine affects all of them. Compare these times only with one another.

    Args:
        networks: Networks by name; the first is the plain one for comparison. They are trained a little: pass copies.
        image_size: Side of the input, in pixels.
        batch_size: Images in a step.
        rounds: Steps of each network, after two for warm-up.
        classes: Number of classes of the networks.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _step_seconds(networks, image_size, batch_size, rounds, classes)
    finally:
        torch.set_num_threads(threads)
    shape = (1, 3, image_size, image_size)
    work = {name: multiply_adds(network, shape) for name, network in networks.items()}
    plain = next(iter(work.values()))
    return {
        name: Cost(gate_parameters(network), work[name] - plain, seconds[name]) for name, network in networks.items()
    }


def _step_seconds(
    networks: Mapping[str, nn.Module], image_size: int, batch_size: int, rounds: int, classes: int
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    labels = torch.randint(0, classes, (batch_size,), generator=generator)
    optimizers = {name: torch.optim.SGD(network.parameters(), 0.01) for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds + 2):
        for name, network in networks.items():
            start = time.perf_counter()
            F.cross_entropy(network.train()(images), labels).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}
