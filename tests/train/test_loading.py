"""Order and augmentation depend on seed, epoch and index alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecanet.train import DataConfig, Recipe, fit
from ecanet.train.data import TensorImages
from ecanet.train.data.loading import (
    FASHION_MEAN,
    FASHION_STD,
    Augmented,
    EpochSampler,
    ImageData,
    mix_seed,
    train_transform,
)
from ecanet.train.data.loading import test_transform as evaluation_transform


def pictures(count: int = 10, size: int = 28) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, size, size), generator=generator, dtype=torch.uint8)
    return TensorImages(images, torch.arange(count) % 3)


def keys(sampler: EpochSampler, epoch: int) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_image_once_an_epoch_in_another_order() -> None:
    sampler = EpochSampler(100, seed=1, batch_size=8)
    first, second = keys(sampler, 0), keys(sampler, 1)
    assert sorted(index for _, index in first) == sorted(index for _, index in second) == list(range(100))
    assert [index for _, index in first] != [index for _, index in second]
    assert {epoch for epoch, _ in second} == {1}


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert keys(EpochSampler(50, seed=1, batch_size=8), 7) == keys(EpochSampler(50, seed=1, batch_size=8), 7)
    assert keys(EpochSampler(50, seed=1, batch_size=8), 7) != keys(EpochSampler(50, seed=2, batch_size=8), 7)


@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 3), (9, 3), (2, 5), (1, 4)])
def test_processes_share_all_images_evenly(length: int, world: int) -> None:
    shares = [keys(EpochSampler(length, 0, 8, rank, world), 4) for rank in range(world)]
    assert {len(share) for share in shares} == {len(EpochSampler(length, 0, 8, 0, world))}
    counts = Counter(index for share in shares for _, index in share)
    assert set(counts) == set(range(length))
    assert sum(counts.values()) - length < world


@pytest.mark.parametrize(("length", "left"), [(17, 16), (18, 18), (16, 16), (1, 1), (9, 8)])
def test_a_last_batch_of_one_image_is_left_out(length: int, left: int) -> None:
    sampler = EpochSampler(length, seed=0, batch_size=8)
    assert len(keys(sampler, 0)) == len(sampler) == left
    assert {index for epoch in range(20) for _, index in keys(sampler, epoch)} == set(range(length))


def test_skip_leaves_out_what_was_trained_on_once() -> None:
    sampler = EpochSampler(20, seed=0, batch_size=8)
    whole = keys(sampler, 2)
    sampler.skip = 8
    assert keys(sampler, 2) == whole[8:]
    assert keys(sampler, 2) == whole


def test_seeds_do_not_collide() -> None:
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    images = Augmented(pictures(), train_transform(DataConfig()), seed=0)
    first, label = images[3, 5]
    torch.rand(100)
    again, _ = images[3, 5]
    assert first.shape == (3, 28, 28)
    assert first.dtype == torch.uint8
    assert label == 5 % 3
    assert torch.equal(first, again)
    assert any(not torch.equal(first, images[epoch, 5][0]) for epoch in range(4, 8))
    other = Augmented(pictures(), train_transform(DataConfig()), seed=1)
    assert any(not torch.equal(images[epoch, 5][0], other[epoch, 5][0]) for epoch in range(8))


def test_augmentation_leaves_the_global_generator_alone() -> None:
    images = Augmented(pictures(), train_transform(DataConfig()), seed=0)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    _ = images[0, 0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("augment", ["crop", "resized_crop", "none"])
@pytest.mark.parametrize("size", [20, 28, 40])
def test_pictures_have_the_size_asked_for(augment: str, size: int) -> None:
    config = DataConfig(augment=augment, image_size=size)  # type: ignore[arg-type]
    for transform in (train_transform(config), evaluation_transform(config)):
        assert transform(pictures()[0][0]).shape == (1, size, size)


def test_folder_pictures_are_resized_and_cropped() -> None:
    config = DataConfig("image_folder", root=Path("unused"), image_size=224)
    assert evaluation_transform(config)(torch.zeros(3, 300, 500, dtype=torch.uint8)).shape == (3, 224, 224)


def test_means_of_the_embedded_pictures_are_near_the_constants() -> None:
    pixels = ImageData(DataConfig()).splits.train.images.float() / 255  # type: ignore[attr-defined]
    assert pixels.mean().item() == pytest.approx(FASHION_MEAN[0], abs=0.005)
    assert pixels.std().item() == pytest.approx(FASHION_STD[0], abs=0.005)


def test_corrupt_image_stops_training_with_its_name_and_loses_nothing(
    tiny: Callable[..., Recipe], image_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    for path in image_folder.rglob("*.png"):
        target = root / path.relative_to(image_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    recipe = tiny(epochs=1)
    recipe = replace(recipe, data=replace(recipe.data, root=root))
    longer = replace(recipe, optim=replace(recipe.optim, epochs=2))
    out = tmp_path / "out"

    def damage(record: dict[str, float]) -> None:
        (root / "train" / "boot" / "07.png").write_bytes(b"\x89PNG damaged")

    with pytest.raises(ValueError, match=r"boot/07\.png"):
        fit(longer, out, progress=False, on_epoch=damage)
    (root / "train" / "boot" / "07.png").write_bytes((image_folder / "train" / "boot" / "07.png").read_bytes())
    assert len(fit(longer, out, resume=True, progress=False).history) == 2


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("it broke\nbadly"), "it broke\nbadly"),
        (KeyError("a key"), "'a key'"),
        (ValueError("two\nlines"), "two\nlines"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_a_loading_process_comes_without_its_traceback(tiny, monkeypatch, error, says) -> None:
    def fail(self: Augmented, key: tuple[int, int]) -> None:
        raise error

    monkeypatch.setattr(Augmented, "__getitem__", fail)
    with pytest.raises(type(error)) as raised:
        fit(tiny(workers=1, epochs=1), None, progress=False)
    assert raised.value.args == (says,)
