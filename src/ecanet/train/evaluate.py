"""Validate a trained network, and predict with it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ecanet.train.average_precision import MeanAveragePrecision
from ecanet.train.checkpoint import (
    TrainedNetwork,
    load_trained,
)
from ecanet.train.classifier import Classifier
from ecanet.train.config import FILE_SOURCES, SOURCES_OF, DataConfig
from ecanet.train.data.loading import ImageData, Plain, read_splits, test_transform
from ecanet.train.data.pictures import SUFFIXES, image_files, read_image
from ecanet.train.data.splits import TwoValidationPartsError
from ecanet.train.progress import Progress
from ecanet.train.quiet import quiet_lightning
from ecanet.untrusted import check_file, listed, shown


@dataclass
class Validation:
    """Results of a trained network on validation images, overall and for each class.

    Attributes:
        metrics: ``val/top1``, ``val/top5`` (``val/topN`` with N < 5 classes) in per cent, ``val/loss``. For multi-label
            data ``val/mAP`` and ``val/loss``.
        classes: Class names in label order.
        labels: The class of every validation image, int64 ``(N,)``. For multi-label data 0 and 1 ``(N, classes)``.
        predicted: The most probable class of each image, int64 ``(N,)``. For multi-label data the probabilities ``(N,
            classes)``.
    """

    metrics: dict[str, float]
    classes: list[str]
    labels: Tensor
    predicted: Tensor

    def images(self) -> Tensor:
        """Validation images of each class, int64 ``(classes,)``."""
        if self.labels.dim() == 2:
            return self.labels.sum(0)
        return torch.bincount(self.labels, minlength=len(self.classes))

    def of_each_class(self) -> Tensor:
        """Top-1 of each class in per cent, float64 ``(classes,)``; NaN for a class without images.

        For multi-label data it is the average precision.
        """
        if self.labels.dim() == 2:
            metric = MeanAveragePrecision(len(self.classes))
            metric.update(self.predicted, self.labels)
            return 100 * metric.of_each_class().double()
        correct = torch.bincount(self.labels[self.labels == self.predicted], minlength=len(self.classes))
        return 100 * correct.double() / self.images()

    def confusion(self) -> Tensor:
        """How many images of each class (row) were taken for each class (column), int64 ``(classes, classes)``.

        Raises:
            ValueError: the data is multi-label.
        """
        if self.labels.dim() == 2:
            raise ValueError("a confusion matrix is for one label per image, and this data has several")
        count = len(self.classes)
        return torch.bincount(self.labels * count + self.predicted, minlength=count**2).view(count, count)


def validate(
    run: str | Path, data: DataConfig | None = None, accelerator: str = "auto", build: str | None = None
) -> Validation:
    """Validate a trained network.

    Args:
        run: A run's folder, which means its best.ckpt, or a checkpoint.
        data: Data to use in place of the run's own; it must have the same classes.
        accelerator: Lightning's accelerator.
        build: As in :func:`load_trained`.

    Returns:
        Top-1, top-5 and loss, and the label and prediction of each image.

    Raises:
        FileNotFoundError: there is no checkpoint, or no data.
        ValueError: the data has other classes than the network.

    Example:
        >>> validate("runs/fashion").metrics["val/top1"]  # doctest: +SKIP
        92.57
    """
    trained = load_trained(run, build)
    images = pictures_for(trained, data or data_of_run(run, trained))
    classifier = _classifier(trained)
    outcomes = _Outcomes()
    with quiet_lightning(), Progress() as progress:
        trainer = _evaluation_trainer(accelerator, progress, outcomes)
        (metrics,) = trainer.validate(classifier, datamodule=images, verbose=False)
    return Validation(dict(metrics), trained.classes, torch.cat(outcomes.labels), torch.cat(outcomes.predicted))


def pictures_for(trained: TrainedNetwork, data: DataConfig) -> ImageData:
    """Load pictures and check that they have the classes of a network.

    Raises:
        FileNotFoundError: there is no data.
        ValueError: the data has other classes than the network.
    """
    images = ImageData(data)
    if list(images.classes) != trained.classes:
        theirs, own = listed(images.classes, 10), listed(trained.classes, 10)
        raise ValueError(f"the data's classes ({theirs}) are not the network's ({own})")
    if images.multi_label != trained.multi_label:
        has, has_not = ("data", "network") if images.multi_label else ("network", "data")
        raise ValueError(f"the {has} has several labels per image, and the {has_not} has one")
    return images


class _Outcomes(Callback):
    """Keeps the label and the prediction of every validation image."""

    def __init__(self) -> None:
        self.labels: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        is_multi_label = batch[1].dim() == 2
        self.labels.append(batch[1].long().cpu())
        self.predicted.append((outputs.sigmoid() if is_multi_label else outputs.argmax(1)).cpu())


@dataclass
class Prediction:
    """The most probable classes of one image.

    Attributes:
        image: The file.
        classes: Names of the classes, the most probable first.
        probabilities: Their probabilities, from 0 to 1. Over all classes they add up to 1, unless the network is
            multi-label.
    """

    image: Path
    classes: list[str]
    probabilities: list[float]


def predict(
    run: str | Path,
    images: Sequence[str | Path],
    top: int = 5,
    batch_size: int = 64,
    accelerator: str = "auto",
    build: str | None = None,
) -> list[Prediction]:
    """Classify image files.

    Args:
        run: A run's folder, which means its best.ckpt, or a checkpoint.
        images: Image files, and folders, which mean all images in them and their subfolders.
        top: Number of classes to return for each image.
        batch_size: Images in a batch.
        accelerator: Lightning's accelerator.
        build: As in :func:`load_trained`.

    Raises:
        FileNotFoundError: there is no checkpoint, no such image, or no image in a folder.
        ValueError: a file is not an image that can be read; the message names it.
    """
    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    files = _image_files(images)
    trained = load_trained(run, build)
    pictures = network_inputs(trained, files)
    classifier = _classifier(trained)
    loader = DataLoader(pictures, batch_size, collate_fn=_images_only)
    with quiet_lightning(), Progress() as progress:
        batches = _evaluation_trainer(accelerator, progress).predict(classifier, loader)
    assert batches is not None
    probabilities = torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    values, indices = probabilities.topk(min(top, len(trained.classes)))
    return [
        Prediction(file, [trained.classes[i] for i in row.tolist()], value.tolist())
        for file, row, value in zip(files, indices, values, strict=True)
    ]


def network_inputs(trained: TrainedNetwork, files: Sequence[Path]) -> Plain:
    """The network's inputs for image files before normalisation: pairs of a uint8 image ``(3, H, W)`` and -1."""
    return Plain(_ImageFiles(files), test_transform(data_of(trained, source="image_folder", root=Path())))


#: Largest ``recipe.json``, in bytes; this library writes about 2 kB.
_MAX_RECIPE_BYTES = 2**16


def data_of_run(run: str | Path, trained: TrainedNetwork) -> DataConfig:
    """The pictures of a run, in the place that the recipe in its folder names.

    Raises:
        ValueError: as in :func:`data_of`; or the folder's recipe is damaged.
    """
    run = Path(run)
    return data_of(trained, **_root_of(run if run.is_dir() else run.parent))


def _root_of(folder: Path) -> dict[str, Path]:
    """The places of the pictures that the recipe in a run's folder names, without those that do not exist."""
    path = folder / "recipe.json"
    if not path.is_file():
        return {}
    check_file(path, _MAX_RECIPE_BYTES)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        roots = {"root": data["root"], "val_root": data.get("val_root")}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it, and give --root FOLDER") from error
    return {name: Path(root) for name, root in roots.items() if isinstance(root, str) and Path(root).exists()}


def data_of(trained: TrainedNetwork, **changes: Any) -> DataConfig:
    """The data block for pictures that are processed as in a network's training. The checkpoint names no places.

    Args:
        trained: The network.
        changes: Fields of :class:`DataConfig`. If there is ``val_root`` without ``root``, all of its pictures are used.
            If ``root`` has a validation part, the run's ``val_fraction`` is ignored.

    Raises:
        ValueError: the network was trained on pictures in files, and the caller does not say where they are.
    """
    stored = dict(trained.recipe["data"])
    source = changes.get("source", stored["source"])
    if source in FILE_SOURCES and stored["source"] not in FILE_SOURCES:
        # The files are resized to the size of the network's input, without a margin to crop.
        size = stored["image_size"] or 28
        changes = {"image_size": size, "resize": size} | changes
    if "val_root" in changes:
        stored.pop("val_fraction")
        changes = {"root": changes["val_root"]} | changes
    stored = {name: value for name, value in stored.items() if source in SOURCES_OF.get(name, (source,))}
    values = stored | changes
    if source in FILE_SOURCES and "root" not in values:
        raise ValueError(
            "the network was trained on a folder or table of images, and its checkpoint does not say where they are: "
            "give the place, on the command line with --root FOLDER"
        )
    config = DataConfig(**values)
    if config.val_fraction is not None and "root" in changes:
        try:
            read_splits(config)
        except TwoValidationPartsError:
            return replace(config, val_fraction=None)
        except (OSError, ValueError):  # raised again when the pictures are read for use
            pass
    return config


def _classifier(trained: TrainedNetwork) -> Classifier:
    return Classifier(trained.network, len(trained.classes), trained.mean, trained.std, multi_label=trained.multi_label)


def _evaluation_trainer(accelerator: str, *callbacks: Callback) -> L.Trainer:
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


class _ImageFiles(Dataset[tuple[Tensor, int]]):
    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.files[index]), -1


def _images_only(samples: Iterable[tuple[Tensor, int]]) -> Tensor:
    return torch.stack([image for image, _ in samples])


def _image_files(images: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, images):
        if path.is_dir():
            in_folder = sorted(map(Path, image_files(path)))
            if not in_folder:
                suffixes = ", ".join(SUFFIXES)
                raise FileNotFoundError(f"no image in the folder {shown(path, 300)}: expected {suffixes}")
            files += in_folder
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"no such image: {shown(path, 300)}")
    return files
