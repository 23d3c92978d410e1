"""A trained network's prediction for one image, and its gates compared with those of other images of the class."""

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
from ecanet.train.evaluate import network_inputs
from ecanet.untrusted import check_file

#: Largest number of validation images in a mean, and number of images in a batch.
_MAX_IMAGES, _BATCH = 200, 20


@dataclass
class Explanation:
    """The prediction for one image, and the gates behind it.

    Attributes:
        image: The network's input before normalisation, uint8 ``(3, H, W)``.
        classes: The most probable classes, in descending order.
        probabilities: Their probabilities, from 0 to 1.
        gates: What each gate multiplies the channels by, float64 ``(C,)``, by the gate's qualified name; for a gate
            with a value at every position, the mean over the positions. Shifts that some gates add are not included.
        means: Means of the same over validation images of the first class; None without data.
        images: The number of images that the means are of.
    """

    image: Tensor
    classes: list[str]
    probabilities: list[float]
    gates: dict[str, Tensor]
    means: dict[str, Tensor] | None
    images: int


def explain_prediction(trained: TrainedNetwork, image: Path, data: ImageData | None, top: int = 5) -> Explanation:
    """Classify an image, and compare its gates with those of validation images of the predicted class.

    It runs on the CPU, and uses the first 200 validation images of the class.

    Args:
        trained: The network.
        image: The file.
        data: Pictures with the network's classes; None for no means.
        top: Number of classes to return.

    Raises:
        FileNotFoundError: there is no such image.
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
    picture, _ = network_inputs(trained, [image])[0]
    normalised = trained.normalise(picture[None])
    with evaluating(trained.network):
        probabilities = trained.probabilities(normalised)[0]
    values, indices = probabilities.topk(min(top, len(trained.classes)))
    label = int(indices[0])
    of_class = [] if data is None else _images_of_class(data, label)
    means = None
    if data is not None and of_class:
        means = _of_only_class(gate_values(trained.network, _batches(trained, data, of_class), 1))
    return Explanation(
        picture,
        [trained.classes[i] for i in indices.tolist()],
        values.tolist(),
        _of_only_class(gate_values(trained.network, [(normalised, torch.tensor([0]))], 1)),
        means,
        len(of_class),
    )


def _images_of_class(data: ImageData, label: int) -> list[int]:
    """Indices of the first validation images of a class."""
    images: Any = data.splits.val
    labels = (images.label(i) for i in range(data.validation_images))
    indices = (i for i, own in enumerate(labels) if (label in own if isinstance(own, tuple) else label == own))
    return list(islice(indices, _MAX_IMAGES))


def _batches(trained: TrainedNetwork, data: ImageData, indices: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the chosen images, all with the label 0."""
    pictures = Plain(data.splits.val, test_transform(data.config))
    for start in range(0, len(indices), _BATCH):
        images = torch.stack([pictures[i][0] for i in indices[start : start + _BATCH]])
        yield trained.normalise(images), torch.zeros(len(images), dtype=torch.long)


def _of_only_class(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: of_classes[0] for name, of_classes in values.items()}
