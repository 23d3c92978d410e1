"""Makes batches of pictures. Order and augmentation depend only on seed, epoch and index.

So a killed run can reach exactly the weights of an uninterrupted one, with any number of loading processes: no state of
a random generator has to be saved.
"""

from collections.abc import Callable, Iterator, Sized
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2

from ecanet.train.config import DataConfig
from ecanet.train.data.csv_file import SEPARATORS, Columns, csv_images
from ecanet.train.data.folders import image_folder
from ecanet.train.data.hub_tables import hub_images
from ecanet.train.data.sources import embedded, fashion_mnist
from ecanet.train.data.splits import Split, Splits
from ecanet.train.data.verify import verify_images

#: Numbers that make the seeds of the order and of the augmentation different.
_SHUFFLE, _AUGMENT = 1, 2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Mean and standard deviation of Fashion-MNIST's training pixels, which are grey: the same in all three channels.
FASHION_MEAN, FASHION_STD = (0.2860,) * 3, (0.3530,) * 3
#: Up to this many images are all decoded before training, unless ``data.verify`` says otherwise.
MAX_VERIFIED = 20_000


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several integers, each of which influences every bit.

    Example:
        >>> mix_seed(0, 1) != mix_seed(1, 0)
        True
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        # splitmix64's finaliser (Steele et al., OOPSLA 2014).
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class EpochSampler(Sampler[tuple[int, int]]):
    """The keys ``(epoch, index)`` of one process, shuffled by seed and epoch.

    All processes get the same number of keys: the first few keys are repeated at the end if needed. A last batch with a
    single image is left out, as BatchNorm cannot train on it; which image that is changes with the epoch.

    Args:
        length: Number of images.
        seed: Seed of the order.
        batch_size: Images in a batch.
        rank: Index of this process.
        world: Number of processes.

    Attributes:
        epoch: Set by Lightning before each epoch.
        skip: Number of keys to leave out at the start of the next epoch only: a killed run has already used them.
    """

    def __init__(self, length: int, seed: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        share = -(-length // world)
        self.share = share - 1 if share > batch_size and share % batch_size == 1 else share
        self.epoch = 0
        self.skip = 0

    def __len__(self) -> int:
        """Number of keys for one epoch and process."""
        return self.share

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass by its epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """One pass."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, _SHUFFLE, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        share = order[torch.arange(self.rank, len(self) * self.world, self.world) % self.length]
        skip, self.skip = self.skip, 0
        return iter([(self.epoch, index) for index in share[skip:].tolist()])


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images by key ``(epoch, index)``, each augmented with its own seed.

    Args:
        images: Dataset of ``(uint8 image (C, H, W), label)``.
        transform: A transform that draws from torch's generator.
        seed: Seed of the run.

    Returns:
        ``(uint8 image (3, H, W), label)``.
    """

    def __init__(self, images: Dataset[Any], transform: Callable[[Tensor], Tensor], seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """One augmented image."""
        epoch, index = key
        image, label = self.images[index]
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(mix_seed(self.seed, _AUGMENT, epoch, index))
        try:
            return _as_rgb(self.transform(image)), label
        finally:
            generator.set_state(state)


class Plain(Dataset[tuple[Tensor, int]]):
    """Images by index, after a transform that draws no random numbers."""

    def __init__(self, images: Dataset[Any], transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        """Number of images."""
        return _length(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image."""
        image, label = self.images[index]
        return _as_rgb(self.transform(image)), label


class ImageData(L.LightningDataModule):
    """The loaders of a recipe.

    Args:
        config: The recipe's ``data`` block.
        seed: Seed of order and augmentation.

    Attributes:
        classes: Class names in label order.
        multi_label: Whether a picture may have several labels: they are then float32 ``(N, classes)`` of 0 and 1.
        mean: Mean of each of the 3 channels, of pixels in 0..1.
        std: Standard deviation of each.

    Raises:
        FileNotFoundError, ValueError: the data is missing or wrong; see :func:`read_splits`.
    """

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.splits = read_splits(config)
        self.classes, self.multi_label = self.splits.classes, self.splits.multi_label
        self._resume_at = {"epoch": 0, "batches": 0}
        self.mean, self.std = (IMAGENET_MEAN, IMAGENET_STD) if config.has_files else (FASHION_MEAN, FASHION_STD)

    @property
    def training_images(self) -> int:
        """Number of training images."""
        return _length(self.splits.train)

    @property
    def validation_images(self) -> int:
        """Number of validation images."""
        return _length(self.splits.val)

    def verify(self, first: bool = True) -> None:
        """Decode every picture, as ``data.verify`` says: by default if there are :data:`MAX_VERIFIED` or fewer.

        Args:
            first: Whether this is the first process of a run; the others leave it to that one.

        Raises:
            ValueError: some cannot be read; the message lists them.
        """
        few = self.training_images + self.validation_images <= MAX_VERIFIED
        if first and self.config.has_files and (few if self.config.verify is None else self.config.verify):
            verify_images(self.splits)

    def _build_sampler(self, rank: int, world: int) -> EpochSampler:
        return EpochSampler(self.training_images, self.seed, self.config.batch_size, rank, world)

    def batches_per_epoch(self, world: int) -> int:
        """Training batches of each of ``world`` processes in an epoch."""
        return -(-len(self._build_sampler(0, world)) // self.config.batch_size)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Batches of ``(uint8 images (N, 3, H, W), labels)``; labels are ``(N,)``, or as for ``multi_label``."""
        trainer = self.trainer
        assert trainer is not None
        self._sampler = self._build_sampler(trainer.global_rank, trainer.world_size)
        epochs, batches = divmod(self._resume_at["batches"], self.batches_per_epoch(trainer.world_size))
        self._sampler.epoch = self._resume_at["epoch"] + epochs
        self._sampler.skip = batches * self.config.batch_size
        images = Augmented(self.splits.train, train_transform(self.config), self.seed)
        return DataLoader(images, sampler=self._sampler, **self._options())

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Batches of ``(uint8 images (N, 3, H, W), labels)``; every image once over all processes."""
        trainer = self.trainer
        share = range(self.validation_images)
        if trainer is not None:
            share = share[trainer.global_rank :: trainer.world_size]
        return DataLoader(Plain(self.splits.val, test_transform(self.config)), sampler=list(share), **self._options())

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been trained on; the loader may have read more."""
        assert self.trainer is not None
        progress = vars(self.trainer.fit_loop.epoch_loop.batch_progress.current)
        return {"epoch": self._sampler.epoch, "batches": int(progress["processed"])}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Set where to go on; Lightning calls this before it asks for the loader."""
        self._resume_at = state_dict

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.config.batch_size,
            "num_workers": self.config.workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.config.workers > 0,
        }


def read_splits(config: DataConfig) -> Splits:
    """The training and validation images that a ``data`` block names."""
    if config.source == "embedded":
        return embedded()
    if config.source == "fashion_mnist":
        return fashion_mnist(config.root, download=config.download)
    assert config.root is not None
    split = Split(config.val_fraction, config.split_seed)
    if config.source == "image_folder":
        return image_folder(config.root, config.val_root, split)
    columns = Columns(config.image_column, config.label_column, SEPARATORS[config.label_separator])
    return {"csv": csv_images, "hf": hub_images}[config.source](config.root, config.val_root, split, columns)


def train_transform(config: DataConfig) -> Callable[[Tensor], Tensor]:
    """Augmentation of training images, uint8 ``(C, H, W)`` to uint8 ``(C, image_size, image_size)``."""
    size = image_size_of(config)
    augment = config.augment
    if augment == "auto":
        augment = "resized_crop" if config.has_files else "crop"
    if augment == "none":
        return v2.Compose([test_transform(config), *_colours(config)])
    if augment == "crop":
        crop: list[v2.Transform] = [v2.RandomCrop(size, padding=max(1, size // 8))]
        if config.has_files or size != 28:
            crop.insert(0, v2.Resize((size, size), InterpolationMode.BILINEAR, antialias=True))
    else:
        crop = [v2.RandomResizedCrop(size, antialias=True)]
    return v2.Compose([*crop, v2.RandomHorizontalFlip(), *_colours(config)])


def _colours(config: DataConfig) -> list[v2.Transform]:
    """RandAugment (Cubuk et al., 2020) and colour jitter, if the recipe has them."""
    transforms: list[v2.Transform] = []
    if config.randaugment is not None:
        transforms.append(v2.RandAugment(magnitude=config.randaugment))
    if config.color_jitter:
        transforms.append(v2.ColorJitter(*[config.color_jitter] * 3))
    return transforms


def test_transform(config: DataConfig) -> Callable[[Tensor], Tensor]:
    """The transform of validation and prediction, uint8 ``(C, H, W)`` to uint8 ``(C, image_size, image_size)``."""
    size = image_size_of(config)
    if config.has_files:
        resize = config.resize or round(size * 256 / 224)
        return v2.Compose([v2.Resize(resize, InterpolationMode.BILINEAR, antialias=True), v2.CenterCrop(size)])
    return v2.Identity() if size == 28 else v2.Resize((size, size), InterpolationMode.BILINEAR, antialias=True)


def image_size_of(config: DataConfig) -> int:
    """Height and width of the network's input, in pixels."""
    return config.image_size or (224 if config.has_files else 28)


def _as_rgb(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image


def _length(images: Dataset[Any]) -> int:
    assert isinstance(images, Sized)
    return len(images)
