"""What the data block of a recipe says: refused where it makes no sense, and the same pictures at every reading."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ecanet.cli import main
from ecanet.files.state_dicts import safe_save
from ecanet.train import DataConfig, Recipe, fit, validate
from ecanet.train.checkpoint import load_trained, read_checkpoint
from ecanet.train.config import to_plain
from ecanet.train.data import loading
from ecanet.train.data.loading import ImageData
from ecanet.train.evaluate import data_of, predict
from ecanet.train.recipes import for_parser, read_recipe

WRONG: dict[str, tuple[dict[str, object], str]] = {
    "a source": ({"source": "imagenet"}, "data.source must be one of embedded, fashion_mnist, image_folder, csv, hf"),
    "no root": ({"source": "csv", "root": None}, "data.root must name the CSV file, got null"),
    "no root of tables": ({"source": "hf", "root": None}, "data.root must name the folder of the Arrow or Parquet"),
    "a fraction of 0": ({"val_fraction": 0}, "data.val_fraction must be between 0 and 1, such as 0.1, got 0"),
    "a fraction of 1": ({"val_fraction": 1.0}, "data.val_fraction must be between 0 and 1, such as 0.1, got 1.0"),
    "a fraction above 1": ({"val_fraction": 10}, "data.val_fraction must be at most 1, got 10"),
    "a fraction that is text": ({"val_fraction": "0.1"}, "data.val_fraction must be a number, got 0.1"),
    "a fraction and a place": (
        {"val_fraction": 0.1, "val_root": Path("v")},
        "data.val_fraction=0.1 and data.val_root='v' both choose the validation pictures: leave one out",
    ),
    "a negative seed": ({"split_seed": -1}, "data.split_seed must be 0 or more, got -1"),
    "half a seed": ({"split_seed": 0.5}, "data.split_seed must be a whole number, got 0.5"),
    "a fraction of Fashion-MNIST": (
        {"source": "embedded", "root": None, "val_fraction": 0.1},
        "data.val_fraction is for data.source=image_folder or csv or hf, got data.source=embedded",
    ),
    "verify for Fashion-MNIST": (
        {"source": "embedded", "root": None, "verify": True},
        "data.verify is for data.source=image_folder or csv or hf, got data.source=embedded",
    ),
    "a column of a folder": (
        {"label_column": "breed"},
        "data.label_column is for data.source=csv or hf, got data.source=image_folder",
    ),
    "a separator of a folder": (
        {"label_separator": "space"},
        "data.label_separator is for data.source=csv, got data.source=image_folder",
    ),
    "a separator": (
        {"source": "csv", "label_separator": "|"},
        "data.label_separator must be one of pipe, semicolon, comma, space, none, got '|'",
    ),
    "a column that is no text": ({"source": "csv", "image_column": ["a"]}, "data.image_column must be the name of a"),
    "root of the embedded": ({"source": "embedded"}, "data.root='photos' is not used by data.source=embedded"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_makes_no_sense_is_named(kind: str) -> None:
    changes, message = WRONG[kind]
    given: dict[str, object] = {"source": "image_folder", "root": Path("photos")} | changes
    with pytest.raises((TypeError, ValueError)) as caught:
        DataConfig(**given)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_recipe_can_say_all_of_it(tmp_path: Path) -> None:
    config = DataConfig("csv", Path("1"), None, 0.5, 7, "photo", "breed", "space", verify=False)
    (tmp_path / "recipe.yaml").write_text(for_parser({"data": to_plain(config)}))
    assert read_recipe(tmp_path / "recipe.yaml")["data"] == to_plain(config) | {"root": "./1"}
    assert '"val_root": "./2"' in for_parser({"data": {"val_root": "2"}})  # not the number
    for name, value in (("label_separator", "[a]"), ("label_column", "{a: b}"), ("source", "*a")):
        (tmp_path / "recipe.yaml").write_text(f"data: {{{name}: '{value}'}}")
        with pytest.raises(ValueError, match=rf"data.{name} cannot be this text"):
            read_recipe(tmp_path / "recipe.yaml")


def test_the_help_says_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in ("val_root", "val_fraction", "split_seed", "image_column", "label_column", "label_separator"):
        assert f"--data.{name} " in said
    assert "Share of the training pictures of each class that is used for validation instead" in said


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images of 12 x 12 pixels of each of two classes, without train and val."""
    root, generator = tmp_path_factory.mktemp("classes"), torch.Generator().manual_seed(0)
    for label, name in enumerate(("boot", "coat")):
        (root / name).mkdir()
        for i in range(20):
            noise = torch.randint(0, 60, (12, 12, 3), generator=generator)
            noise[..., label] += 120
            Image.fromarray(noise.to(torch.uint8).numpy()).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def config(classes: Path) -> DataConfig:
    return DataConfig("image_folder", classes, val_fraction=0.25, image_size=12, resize=12, batch_size=8)


def small(config: DataConfig) -> Recipe:
    recipe = Recipe(data=config)
    recipe.model.options, recipe.trainer.accelerator, recipe.optim.epochs = {"widths": [8, 16]}, "cpu", 3
    return recipe


def held(config: DataConfig, seed: int = 0) -> list[str]:
    return [path for path, _ in ImageData(config, seed).splits.val.samples]  # type: ignore[attr-defined]


def test_the_split_has_a_seed_of_its_own_so_that_a_study_keeps_it(config: DataConfig) -> None:
    assert held(config, seed=0) == held(config, seed=1)
    assert len(held(config)) == 10
    assert held(config) != held(replace(config, split_seed=1))


@pytest.fixture(scope="module")
def run(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs on a folder without validation, interrupted in the second."""
    out = tmp_path_factory.mktemp("run")

    def interrupt(record: dict[str, float]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(small(config), out, progress=False, on_epoch=interrupt)
    fit(small(config), out, resume=True, progress=False)
    return out


def test_a_run_on_a_fraction_is_validated_on_a_folder_that_sets_its_own_pictures_apart(
    run: Path, classes: Path, tmp_path: Path
) -> None:
    for part in ("train", "val"):
        shutil.copytree(classes, tmp_path / "other" / part)
    data = data_of(load_trained(run), root=tmp_path / "other")
    assert len(validate(run, data, "cpu").labels) == 40
    moved = data_of(load_trained(run), root=tmp_path / "other" / "val")  # the run's own pictures, elsewhere
    assert len(validate(run, moved, "cpu").labels) == 10


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(run: Path, config: DataConfig, tmp_path: Path) -> None:
    fit(small(config), tmp_path, progress=False)
    there, here = (read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (run, tmp_path))
    assert there.keys() == here.keys()
    assert all(torch.equal(there[key], here[key]) for key in there)


@pytest.mark.parametrize(("name", "value"), [("val_fraction", 0.5), ("split_seed", 1)])
def test_another_split_is_no_way_to_go_on(run: Path, config: DataConfig, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"cannot resume .*data.{name}: .* then, {value} now"):
        fit(small(replace(config, **{name: value})), run, resume=True, progress=False)


def test_a_run_from_before_an_option_existed_had_its_default(run: Path, config: DataConfig, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(run / "last.ckpt")
    for name in ("split_seed", "label_separator", "image_column", "label_column"):
        del checkpoint["ecanet"]["recipe"]["data"][name]
    del checkpoint["ecanet"]["multi_label"]
    safe_save(checkpoint, tmp_path / "last.ckpt")
    assert len(fit(small(config), tmp_path, resume=True, progress=False).history) == 3
    trained = load_trained(tmp_path / "last.ckpt")
    assert (trained.multi_label, trained.recipe["data"]["split_seed"]) == (False, 0)


def test_validate_reads_the_images_that_were_split_off(run: Path, config: DataConfig) -> None:
    trained = load_trained(run)
    assert held(data_of(trained, root=config.root)) == held(config)
    best = max(record["val/top1"] for record in load_trained(run / "last.ckpt").history)
    assert validate(run).metrics["val/top1"] == pytest.approx(best)


def test_validate_takes_all_of_another_folder(run: Path, classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(load_trained(run), val_root=classes)
    assert ImageData(data).validation_images == 40
    main(["validate", str(run), "--val_root", str(classes)])
    assert f"{validate(run, data).metrics['val/top1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["val_fraction", "split_seed", "label_column", "label_separator", "source"])
def test_a_checkpoint_is_checked_as_a_recipe_is(run: Path, tmp_path: Path, key: str) -> None:
    checkpoint = read_checkpoint(run / "last.ckpt")
    checkpoint["ecanet"]["recipe"]["data"][key] = {"a": 1} if key == "label_column" else "../.."
    safe_save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=rf"last\.ckpt is damaged, .*data\.{key} "):
        load_trained(tmp_path / "last.ckpt")


def test_pictures_are_predicted_as_they_were_trained_on(run: Path, tmp_path: Path) -> None:
    upright = Image.fromarray(torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8).numpy())
    exif = Image.Exif()
    exif[274] = 3
    upright.save(tmp_path / "a.png")
    upright.rotate(180).save(tmp_path / "b.png", exif=exif)
    first, second = predict(run, [tmp_path / "a.png", tmp_path / "b.png"])
    assert first.probabilities == second.probabilities


VERIFIED = {
    "few": (None, 100, True),
    "many": (None, 39, False),
    "many, as asked for": (True, 39, True),
    "few, not asked for": (False, 100, False),
}


@pytest.mark.parametrize("kind", VERIFIED)
def test_images_are_verified_before_training_if_they_are_few_or_as_asked_for(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    verify, most, verified = VERIFIED[kind]
    seen: list[object] = []
    monkeypatch.setattr(loading, "MAX_VERIFIED", most)
    monkeypatch.setattr(loading, "verify_images", seen.append)
    data = ImageData(replace(config, verify=verify))
    data.verify(first=False)
    assert not seen
    data.verify()
    assert bool(seen) == verified


def test_every_bad_image_is_named_before_the_first_step(config: DataConfig, classes: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("boot", "coat"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            (root / name / f"{i}.png").write_bytes((classes / name / f"{i:02}.png").read_bytes())
    (root / "boot" / "1.png").write_bytes(b"no image")
    (root / "coat" / "3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 8 images cannot be read") as caught:
        fit(small(replace(config, root=root)), tmp_path / "out", progress=False)
    assert all(name in str(caught.value) for name in ("boot/1.png': it is no", "coat/3.png': it is empty"))
    assert not (tmp_path / "out").exists()
