"""Profile networks by name: count, measure, and compare with the paper's numbers."""

import os
from collections.abc import Sequence

import torch

from ecanet.profile.counts import Counts, count
from ecanet.profile.machine import describe
from ecanet.profile.measure import Progress, Settings, measure, threads_of_torch
from ecanet.profile.paper import TABLE3
from ecanet.profile.result import Profile, ProfileRow
from ecanet.profile.subjects import Subject, subjects, subjects_of_table3

#: Default number of pictures in a batch.
_BATCH_ON_CPU, _BATCH_ON_GPU = 8, 64


def profile_models(
    models: Sequence[str | os.PathLike[str]],
    gates: Sequence[str] = (),
    *,
    time: bool = True,
    batch_size: int | None = None,
    image_size: int | None = None,
    threads: int | None = None,
    rounds: int = 10,
    device: str = "cpu",
    on_progress: Progress = lambda _: None,
) -> Profile:
    """Measure what networks cost on this machine; they take turns, A B A B ...

    Args:
        models: Names in :data:`ecanet.models.MODELS`, ``torchvision/NAME``, ``timm/NAME``, model files of Ultralytics
            (``yolo11n.yaml``), files of ``ecanet insert --save``, checkpoints, folders of runs.
        gates: Names in :data:`ecanet.nn.GATES`, ``timm:NAME``, and ``none``: every network is profiled with every gate.
            If empty, each network keeps the gates that its name implies.
        time: Measure time and memory; otherwise count only.
        batch_size: Pictures in a batch, by default 8, or 64 on a GPU.
        image_size: Height and width in pixels, by default each network's own.
        threads: Number of torch's threads, by default its current number; at most the cores of the machine.
        rounds: Turns of each network.
        device: ``cpu``, or ``cuda`` with or without a number.
        on_progress: Called with a line of text.

    Raises:
        ImportError: a network is from a library that is not installed.
        FileNotFoundError: there is no such file.
        ValueError: a name is unknown, a number is below 1, there are more threads than cores, there is no such device,
            or a network does not run.

    Example:
        >>> row = profile_models(["eca_resnet18"], ["se"], time=False).rows[0]
        >>> row.name, row.counts.parameters, row.counts.gate_parameters
        ('eca_resnet18 + se', 11776552, 87040)
    """
    settings = _checked(batch_size, image_size, threads, rounds, device)
    on_progress("looking up networks")
    return _profile([subjects(models, gates)], settings, image_size, time, on_progress)


def table3(
    *,
    time: bool = True,
    batch_size: int | None = None,
    image_size: int | None = None,
    threads: int | None = None,
    rounds: int = 10,
    device: str = "cpu",
    on_progress: Progress = lambda _: None,
) -> Profile:
    """Measure the networks of the paper's Table 3 on this machine; the networks of each backbone take turns.

    Three competitors have only the paper's figures: A2-Nets, GSoP-Net1 and AA-Net. GCNet needs timm.

    Args:
        time: Measure time and memory; otherwise count only.
        batch_size: As in :func:`profile_models`.
        image_size: Height and width in pixels, by default 224.
        threads: As in :func:`profile_models`.
        rounds: Turns of each network.
        device: As in :func:`profile_models`.
        on_progress: Called with a line of text.

    Raises:
        ImportError: timm is not installed.
        ValueError: as in :func:`profile_models`.
    """
    settings = _checked(batch_size, image_size, threads, rounds, device)
    profile = _profile(subjects_of_table3(), settings, image_size, time, on_progress)
    built = {row.name: row for row in profile.rows}
    rows = tuple(built.get(row.name) or ProfileRow(row.name, None, None, None, row) for row in TABLE3)
    return Profile(rows, profile.settings, profile.machine)


def _profile(
    groups: Sequence[Sequence[Subject]], settings: Settings, image_size: int | None, time: bool, on_progress: Progress
) -> Profile:
    rows = []
    total = sum(len(group) for group in groups)
    with threads_of_torch(settings.threads), torch.random.fork_rng():
        torch.manual_seed(0)
        machine = describe(settings.device, settings.threads)
        counts: dict[str, Counts] = {}
        for group in groups:
            for subject in group:
                on_progress(f"{subject.name}: counts, network {len(counts) + 1} of {total}")
                counts[subject.name] = count(subject, image_size or subject.image_size)
        for group in groups:
            sizes = [image_size or subject.image_size for subject in group]
            results = measure(group, sizes, settings, on_progress) if time else [None] * len(group)
            for subject, size, measured in zip(group, sizes, results, strict=True):
                rows.append(ProfileRow(subject.name, size, counts[subject.name], measured, subject.paper))
    about = {
        "batch_size": settings.batch_size,
        "rounds": settings.rounds,
        "threads": settings.threads,
        "device": str(settings.device),
        "dtype": "float32",
    }
    return Profile(tuple(rows), about if time else None, machine)


def _checked(batch_size: int | None, image_size: int | None, threads: int | None, rounds: int, device: str) -> Settings:
    numbers = {"batch_size": batch_size, "image_size": image_size, "threads": threads, "rounds": rounds}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise ValueError(f"threads must be at most {cores}, the cores of this machine, got {threads}")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, such as cuda:0, got {device!r}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of the {torch.cuda.device_count()} GPUs that torch sees, got {device!r}")
    default = _BATCH_ON_GPU if place.type == "cuda" else _BATCH_ON_CPU
    return Settings(batch_size or default, rounds, threads or torch.get_num_threads(), place)
