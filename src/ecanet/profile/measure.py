"""What is measured while networks take turns: time, memory, and the share of the time that gates take."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecanet.profile.counts import INPUT_ERRORS, first_words
from ecanet.profile.memory import bytes_kept, peak_bytes
from ecanet.profile.subjects import Subject, attention_modules
from ecanet.profile.turns import Competitor, Ratio, ratio_of_medians, take_turns
from ecanet.profile.work import inference, loss_of, settle, training

Progress = Callable[[str], object]
_TRAINING, _INFERENCE, _LATENCY = "training", "inference", "latency"


@dataclass(frozen=True)
class Settings:
    """How networks are measured.

    Attributes:
        batch_size: Pictures in a training step, and in a call at inference; latency is that of one picture.
        rounds: Turns of each network.
        threads: Number of torch's threads.
        device: Where the networks run.
    """

    batch_size: int
    rounds: int
    threads: int
    device: torch.device


@dataclass(frozen=True)
class Measured:
    """Time and memory of a network on this machine: medians with 95 % bootstrap intervals over the rounds.

    Attributes:
        seconds: Seconds of one call in every round, for each of ``training``, ``inference`` and ``latency``.
        training: Pictures per second in training.
        inference: Pictures per second at inference.
        latency: Seconds for one picture.
        share_of_training: Share of a training step that removing the gates saves; None without gates. Because of noise
            it may be below 0.
        share_of_inference: The same at inference.
        saved_bytes: Bytes that the forward pass of a step keeps for the backward pass, without parameters and buffers.
        peak_of_training: Most bytes that a step holds at a time, without parameters, buffers and the optimizer's state.
        peak_of_inference: Most bytes that a call holds at a time, without parameters and buffers.
    """

    seconds: Mapping[str, tuple[float, ...]]
    training: Ratio
    inference: Ratio
    latency: Ratio
    share_of_training: Ratio | None
    share_of_inference: Ratio | None
    saved_bytes: int
    peak_of_training: int
    peak_of_inference: int


def measure(
    subjects: Sequence[Subject], image_sizes: Sequence[int], settings: Settings, on_progress: Progress
) -> list[Measured]:
    """Measure networks in turn, A B A B ..., together with the same networks without their gates.

    Args:
        subjects: The networks.
        image_sizes: Height and width of each network's pictures.
        settings: How to measure.
        on_progress: Called with a line of text.

    Raises:
        ValueError: a network does not train or run on such pictures.
    """
    networks = {subject.name: subject.build() for subject in subjects}
    sizes = dict(zip(networks, image_sizes, strict=True))
    twins = _add_twins(subjects, networks, sizes)
    batches = {name: _batch(settings, size) for name, size in sizes.items()}
    memory = {}
    for name, network in networks.items():
        on_progress(f"{name}: memory")
        memory[name] = _measure_memory(name, network.to(settings.device), *batches[name])
    seconds: dict[str, dict[str, tuple[float, ...]]] = {name: {} for name in networks}
    for phase in (_TRAINING, _INFERENCE, _LATENCY):
        competitors = {name: _competitor(phase, networks[name], *batches[name]) for name in networks}
        for name, measured in _take_turns(phase, competitors, settings, on_progress).items():
            seconds[name][phase] = measured
    rows = []
    for subject in subjects:
        own, twin = seconds[subject.name], seconds.get(twins.get(subject.name, ""))
        batch, one = [float(settings.batch_size)] * settings.rounds, [1.0] * settings.rounds
        saved, peak_of_training, peak_of_inference = memory[subject.name]
        rows.append(
            Measured(
                seconds=own,
                training=ratio_of_medians(batch, own[_TRAINING]),
                inference=ratio_of_medians(batch, own[_INFERENCE]),
                latency=ratio_of_medians(own[_LATENCY], one),
                share_of_training=None if twin is None else _share(own[_TRAINING], twin[_TRAINING]),
                share_of_inference=None if twin is None else _share(own[_INFERENCE], twin[_INFERENCE]),
                saved_bytes=saved,
                peak_of_training=peak_of_training,
                peak_of_inference=peak_of_inference,
            )
        )
    return rows


@contextmanager
def threads_of_torch(number: int) -> Iterator[None]:
    """Let torch use this number of threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_seconds(
    networks: Mapping[str, nn.Module], images: Tensor, labels: Tensor, rounds: int, rate: float
) -> dict[str, tuple[float, ...]]:
    """Seconds of a training step of each network in every round; the networks take turns.

    Args:
        networks: The networks by name. A few training steps change their weights: pass copies.
        images: ``(N, 3, H, W)``.
        labels: ``(N,)``.
        rounds: Timed steps of each network, after a warm-up step.
        rate: Learning rate.
    """
    competitors = {name: training(network, images, labels, rate) for name, network in networks.items()}
    _warm_up(competitors)
    timings = take_turns(competitors, rounds, device=images.device.type)
    return {name: timing.seconds for name, timing in timings.items()}


def _add_twins(subjects: Sequence[Subject], networks: dict[str, nn.Module], sizes: dict[str, int]) -> dict[str, str]:
    """Add the networks without gates that are missing; return the name of each network's twin without gates."""
    with_gates = [subject for subject in subjects if attention_modules(networks[subject.name])]
    twins: dict[str, str] = {}
    for subject in with_gates:
        size = sizes[subject.name]
        same = [s.name for s in subjects if s not in with_gates and (s.base, sizes[s.name]) == (subject.base, size)]
        twins[subject.name] = twin = same[0] if same else f"{subject.base} without gates"
        if twin not in networks:
            networks[twin], sizes[twin] = subject.plain(), size
    return twins


def _batch(settings: Settings, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch_size, 3, size, size, generator=generator)
    labels = torch.randint(2**31, (settings.batch_size,), generator=generator)
    return images.to(settings.device), labels.to(settings.device)


def _measure_memory(name: str, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, int, int]:
    """Bytes saved for the backward pass, and the peaks of a training step and of a call at inference."""
    try:
        settle(network.train(), images)
        saved = bytes_kept(network, lambda: loss_of(network(images), labels))
        peaks = []
        for competitor in (training(network, images, labels), inference(network, images)):
            with competitor.context():
                competitor.run()
                peaks.append(peak_bytes(competitor.run, images.device))
    except INPUT_ERRORS as error:
        shape = tuple(images.shape)
        raise ValueError(f"{name} does not train on pictures of shape {shape}: {first_words(error)}") from error
    return saved, peaks[0], peaks[1]


def _competitor(phase: str, network: nn.Module, images: Tensor, labels: Tensor) -> Competitor:
    if phase == _TRAINING:
        return training(network, images, labels)
    return inference(network, images if phase == _INFERENCE else images[:1])


def _take_turns(
    phase: str, competitors: Mapping[str, Competitor], settings: Settings, on_progress: Progress
) -> dict[str, tuple[float, ...]]:
    _warm_up(competitors)
    timings = take_turns(
        competitors,
        settings.rounds,
        on_round=lambda done: on_progress(f"{phase}: round {done} of {settings.rounds}, {len(competitors)} networks"),
        device=settings.device.type,
    )
    return {name: timing.seconds for name, timing in timings.items()}


def _warm_up(competitors: Mapping[str, Competitor]) -> None:
    for competitor in competitors.values():
        with competitor.context():
            competitor.run()


def _share(own: Sequence[float], twin: Sequence[float]) -> Ratio:
    """The share of the time that the gates take, from the seconds with and without them."""
    rest = ratio_of_medians(twin, own)
    return Ratio(1 - rest.value, 1 - rest.high, 1 - rest.low)
