"""What a trained network makes of one image, and how its gates answer it compared with others of the class."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecanet.inspect.per_class import gate_values
from ecanet.networks.running import evaluating, gates
from ecanet.train.checkpoint import TrainedNetwork
from ecanet.train.data.loading import ImageData, Plain, test_transform
from ecanet.train.evaluate import as_seen
from ecanet.untrusted import check_file

#: Most validation images that a mean is taken over, and how many run at a time.
_MOST_IMAGES, _BATCH = 200, 20


@dataclass
class Explanation:
    """The prediction for one image, and the gates behind it.

    Attributes:
        image: The image as the network sees it, uint8 ``(3, H, W)``.
        classes: The most probable classes, the first one first.
        probabilities: Their probabilities, in 0..1.
        gates: What each gate multiplies the channels by, float64 ``(C,)``, by the gate's qualified name; of a gate that
            treats positions differently, the mean over the positions. What some gates add as well is not in it.
        means: The same as means over validation images of the first class; None without data.
        images: How many images these are means of.
    """

    image: Tensor
    classes: list[str]
    probabilities: list[float]
    gates: dict[str, Tensor]
    means: dict[str, Tensor] | None
    images: int


def explain_prediction(trained: TrainedNetwork, image: Path, data: ImageData | None, top: int = 5) -> Explanation:
    """Classify an image, and compare its gates with those of validation images of the class that is predicted.

    It runs on the CPU; of the validation images of the class the first 200 are used.

    Args:
        trained: The network.
        image: The file.
        data: Pictures with the network's classes; None for no means.
        top: Number of classes to name.

    Raises:
        FileNotFoundError: no such image.
        ValueError: the network has no gates, ``top`` is below 1, or the file is not an image that can be read.

    Example:
        >>> explain_prediction(load_trained("runs/fashion"), Path("bag.png"), None).classes[0]  # doctest: +SKIP
        'Bag'
    """
    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    if not gates(trained.network):
        raise ValueError("the network has no gates to explain: model.gate is null, or its attention is not ecanet's")
    check_file(image)
    picture, _ = as_seen(trained, [image])[0]
    seen = trained.normalise(picture[None])
    with evaluating(trained.network):
        probabilities = trained.probabilities(seen)[0]
    values, indices = probabilities.topk(min(top, len(trained.classes)))
    label = int(indices[0])
    places = [] if data is None else _of_class(data, label)
    means = None
    if data is not None and places:
        means = _only(gate_values(trained.network, _batches(trained, data, places), 1))
    return Explanation(
        picture,
        [trained.classes[i] for i in indices.tolist()],
        values.tolist(),
        _only(gate_values(trained.network, [(seen, torch.tensor([0]))], 1)),
        means,
        len(places),
    )


def _of_class(data: ImageData, label: int) -> list[int]:
    """Where the first validation images of a class are."""
    images: Any = data.splits.val
    shown = (images.label(i) for i in range(data.validation_images))
    there = (i for i, has in enumerate(shown) if (label in has if isinstance(has, tuple) else label == has))
    return list(islice(there, _MOST_IMAGES))


def _batches(trained: TrainedNetwork, data: ImageData, places: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    pictures = Plain(data.splits.val, test_transform(data.config))
    for start in range(0, len(places), _BATCH):
        images = torch.stack([pictures[i][0] for i in places[start : start + _BATCH]])
        yield trained.normalise(images), torch.zeros(len(images), dtype=torch.long)


def _only(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: of_classes[0] for name, of_classes in values.items()}
