"""Which pictures are trained on, and which are validated on."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ecanet.untrusted import listed, shown

#: What a picture shows: the index of its class, or the indices of all its classes if the data has several labels.
Label: TypeAlias = int | tuple[int, ...]

#: Names of the part to train on, of the part to validate on, and of the part that takes its place where there is none.
TRAIN_NAMES, VAL_NAMES, TEST_NAMES = ("train", "training"), ("val", "validation", "valid"), ("test", "testing")
PART_NAMES = (*TRAIN_NAMES, *VAL_NAMES, *TEST_NAMES)

#: The most classes, and the longest name of one: a checkpoint holds no more.
MAX_CLASSES, MAX_NAME = 100_000, 200


class Splits(NamedTuple):
    """Training and validation images with their classes.

    Attributes:
        train: Map-style dataset with a length: ``train[i]`` is ``(uint8 image (C, H, W), label)``. With several labels
            an image, the label is float32 ``(classes,)`` of zeros and ones.
        val: As ``train``.
        classes: Class names; a label is an index into them.
        multi_label: Whether an image may have several labels, or none.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]
    multi_label: bool = False


def target(label: Label, classes: int) -> int | Tensor:
    """A label as the loss takes it: an index, or zeros and ones ``(classes,)``, float32."""
    if isinstance(label, int):
        return label
    values = torch.zeros(classes)
    values[list(label)] = 1
    return values


class Split(NamedTuple):
    """How the images to validate on are found where the data does not set them apart.

    Attributes:
        fraction: Share of the training images, or None.
        seed: Which ones.
        elsewhere: Whether they come from another place, ``data.val_root``.
    """

    fraction: float | None = None
    seed: int = 0
    elsewhere: bool = False


class TwoValidationPartsError(ValueError):
    """``val_fraction`` is set, and the data has a part to validate on already."""


def find_parts(names: Iterable[str], where: str, split: Split) -> tuple[str | None, str | None]:
    """The names of the part to train on and of the part to validate on.

    Args:
        names: The names of all parts. Upper and lower case are the same.
        where: What holds them, for errors.
        split: How the validation images are found where no part has them.

    Returns:
        The training part's name, or None if nothing is called so: then all images are meant. The validation part's
        name, or None if ``split`` says where they are.

    Raises:
        FileNotFoundError: there is nothing to train on, or nothing to validate on.
        TwoValidationPartsError: there is one to validate on and ``split`` has a fraction, too.
        ValueError: two parts could be meant.
    """
    every, known = sorted(names), (TRAIN_NAMES, VAL_NAMES, TEST_NAMES)
    train, val, test = ([name for name in every if name.lower() in each] for each in known)
    if not train and (val or test):
        raise FileNotFoundError(
            f"{where} has {_quoted(val + test)}, but nothing to train on: add train, with the same classes in it"
        )
    if len(train) > 1:
        raise ValueError(f"{where} has {_quoted(train)}: which one is to be trained on? Rename the others")
    if split.elsewhere:
        return next(iter(train), None), None
    if split.fraction is not None:
        if val:
            raise TwoValidationPartsError(
                f"data.val_fraction={split.fraction} splits off images to validate on, and {where} has {_quoted(val)}: "
                "leave data.val_fraction out, or rename that"
            )
        return next(iter(train), None), None
    found = val or test
    if not found:
        raise FileNotFoundError(
            f"{where} has no images to validate on: add val ({', '.join((*VAL_NAMES[1:], *TEST_NAMES))} will do, too), "
            "name another place with data.val_root, or let data.val_fraction=0.1 split off a tenth of each class"
        )
    if len(found) > 1:
        raise ValueError(f"{where} has {_quoted(found)}: say with data.val_root which one is to be validated on")
    return next(iter(train), None), found[0]


def split_off(
    keys: Sequence[str], labels: Sequence[Label], classes: Sequence[str], split: Split
) -> tuple[list[int], list[int]]:
    """Split images into two parts, each class by the same fraction.

    The images of a class are sorted by a hash of seed and key, and the first ones are validated on: at least one, and
    not all. The split depends on nothing else, neither on the order of the images nor on the folder they are in, and
    an image that is added later leaves nearly all others where they are. An image with several labels counts for its
    rarest one.

    Args:
        keys: A text for each image, the same wherever the data is, such as its path below the root.
        labels: The labels.
        classes: Class names, for errors.
        split: Fraction and seed.

    Returns:
        The indices of the images to train on, and of those to validate on, both in ascending order.

    Raises:
        ValueError: a class has a single image.
    """
    assert split.fraction is not None
    counts = Counter(index for label in labels if not isinstance(label, int) for index in label)
    digests = [hashlib.sha256(f"{split.seed}/".encode() + os.fsencode(key)).digest() for key in keys]
    members: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(keys)), key=digests.__getitem__):
        label = labels[index]
        members[label if isinstance(label, int) else min(label, key=lambda i: (counts[i], i), default=-1)].append(index)
    alone = [classes[group] for group, found in sorted(members.items()) if len(found) == 1]
    if alone and not counts:
        raise ValueError(
            f"data.val_fraction needs two images or more of each class, and there is one of {listed(alone)}"
        )
    val: list[int] = []
    for found in members.values():
        val += found[: min(max(1, round(split.fraction * len(found))), len(found) - 1)]
    if not val:
        raise ValueError("data.val_fraction needs two or more images with the same labels: add some")
    held = set(val)
    return [index for index in range(len(keys)) if index not in held], sorted(val)


def number_classes(names: Iterable[str]) -> list[str]:
    """Class names in the order of their indices: sorted, by value where all of them are whole numbers."""
    every = set(names)
    whole = all(name.isascii() and name.isdecimal() for name in every)
    return sorted(every, key=lambda name: (int(name), name)) if whole else sorted(every)


def check_classes(classes: Sequence[str], where: str) -> None:
    """Raise ValueError unless a checkpoint can hold these classes, and there are two or more."""
    if len(classes) < 2:
        raise ValueError(f"{where} has one class, {_quoted(classes)}: two or more are needed")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{where} has {len(classes):,} classes, such as {listed(classes, 3)}: at most {MAX_CLASSES:,}")
    if long := [name for name in classes if len(name) > MAX_NAME]:
        raise ValueError(f"{where}: the name of the class {shown(long[0])!r} is longer than {MAX_NAME} characters")


def check_held(labels: Iterable[Label], where: str) -> None:
    """Raise ValueError if no image to validate on has a label: there would be nothing to measure."""
    if all(label == () for label in labels):
        raise ValueError(f"no image to validate on in {where} has a label: name others with data.val_root")


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"'{shown(name)}'" for name in names)
