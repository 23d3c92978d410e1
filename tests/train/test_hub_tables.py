"""Image data as Hugging Face's ``datasets`` saves it: read from its tables alone, offline."""

import io
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ecanet.train.data import Columns, Split, Splits, hub_images, verify_images

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
HALF = Split(0.5)


@pytest.fixture(autouse=True, scope="module")
def _no_bars(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:  # Parquet files are copied there
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    datasets.enable_progress_bars()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def picture(value: int, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(file, "PNG", **options)
    return file.getvalue()


def make(count: int = 4, features: dict[str, Any] = FEATURES, **columns: list[Any]) -> Any:
    """A table of so many pictures, of red 0, 1, ..., with the labels 0, 1, 0, ..."""
    given = {"image": [{"bytes": picture(i), "path": None} for i in range(count)]}
    given |= {"label": [i % 2 for i in range(count)]} if "label" in features else {}
    return datasets.Dataset.from_dict(given | columns, features=datasets.Features(features))


def contents(splits: Splits) -> list[dict[int, Any]]:
    """Red of each picture and its label, for both parts."""
    return [{int(image[0, 0, 0]): label for image, label in part} for part in splits[:2]]  # type: ignore[attr-defined]


def one_table(root: Path) -> None:
    make().save_to_disk(root)


def one_parquet(root: Path) -> None:
    root.mkdir()
    make().to_parquet(root / "photos.parquet")


@pytest.mark.parametrize("save", [one_table, one_parquet])
def test_a_table_without_parts_is_split(tmp_path: Path, save: Callable[[Path], None]) -> None:
    save(tmp_path / "photos")
    splits = hub_images(tmp_path / "photos", split=HALF)
    assert (splits.classes, splits.multi_label) == (("dog", "cat"), False)
    mine, held = contents(splits)
    assert mine | held == {0: 0, 1: 1, 2: 0, 3: 1}
    assert sorted(held.values()) == [0, 1]
    verify_images(splits)


def parts_on_disk(root: Path, held: str) -> None:
    datasets.DatasetDict({"train": make(4), held: make(2)}).save_to_disk(root)


def parts_of_the_hub(root: Path, held: str) -> None:
    (root / "data").mkdir(parents=True)
    make(4).to_parquet(root / "data" / "train-00000-of-00001.parquet")
    make(2).to_parquet(root / "data" / f"{held}-00000-of-00001.parquet")


def parts_in_folders(root: Path, held: str) -> None:
    for name, count in (("train", 4), (held, 2)):
        (root / "default" / name).mkdir(parents=True)
        make(count).to_parquet(root / "default" / name / "0000.parquet")


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_one_file_is_a_table_too(tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        make().to_parquet(tmp_path / "train-photos.parquet")
    else:
        make().save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "train-photos.arrow")
    file = tmp_path / f"train-photos.{ending}"
    assert contents(hub_images(file, file)) == [{0: 0, 1: 1, 2: 0, 3: 1}] * 2
    assert len(hub_images(file, split=HALF).val) == 2  # type: ignore[arg-type]
    (tmp_path / "photos.csv").write_text("file,label\n")
    with pytest.raises(FileNotFoundError, match=r"photos.csv' has neither .arrow .*data.source=csv"):
        hub_images(tmp_path / "photos.csv", split=HALF)


def test_tables_are_read_without_bars_where_nobody_looks_on(tmp_path: Path, capfd) -> None:
    one_parquet(tmp_path / "photos")
    datasets.enable_progress_bars()
    try:
        hub_images(tmp_path / "photos", split=HALF)
        assert not datasets.are_progress_bars_disabled(), "the user's own setting is kept"
    finally:
        datasets.disable_progress_bars()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("held", ["validation", "test"])
@pytest.mark.parametrize("save", [parts_on_disk, parts_of_the_hub, parts_in_folders])
def test_parts_are_known_by_their_names(tmp_path: Path, save: Callable[[Path, str], None], held: str) -> None:
    save(tmp_path / "photos", held)
    assert contents(hub_images(tmp_path / "photos")) == [{0: 0, 1: 1, 2: 0, 3: 1}, {0: 0, 1: 1}]
    assert len(hub_images(tmp_path / "photos", tmp_path / "photos").val) == 2  # type: ignore[arg-type]


def test_pictures_are_decoded_as_those_in_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    make(2, image=[{"bytes": picture(i, exif=exif), "path": None} for i in range(2)]).save_to_disk(tmp_path / "one")
    splits = hub_images(tmp_path / "one", tmp_path / "one")
    assert splits.train[0][0].shape == (3, 6, 4)


LABELS = {
    "texts": (datasets.Value("string"), ["b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0]),
    "numbers": (datasets.Value("int64"), [10, 9, 10, 9], ("9", "10"), [1, 0, 1, 0]),
    "lists of classes": (datasets.List(FEATURES["label"]), [[0, 1], [], [1], [1]], ("dog", "cat"), None),
    "lists of texts": (datasets.List(datasets.Value("string")), [["dog", "cat"], [], ["cat"], ["cat"]], None, None),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_classes_texts_numbers_or_lists_of_them(tmp_path: Path, kind: str) -> None:
    feature, values, classes, numbers = LABELS[kind]
    make(4, {**FEATURES, "label": feature}, label=values).save_to_disk(tmp_path / "one")
    splits = hub_images(tmp_path / "one", tmp_path / "one")
    assert splits.classes == (classes or ("cat", "dog"))
    assert splits.multi_label == (numbers is None)
    found = [splits.train[i][1] for i in range(4)]
    if numbers is None:
        shows = ({"dog", "cat"}, set[str](), {"cat"}, {"cat"})
        hot = [[float(name in each) for name in splits.classes] for each in shows]
        assert torch.stack(found).tolist() == hot
    else:
        assert found == numbers


def test_columns_are_named_where_types_do_not_tell(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["small", "large"])
    features = {**FEATURES, "coarse": names, "thumbnail": datasets.Image()}
    thumbnails = [{"bytes": picture(100 + i), "path": None} for i in range(4)]
    make(4, features, coarse=[0, 0, 1, 1], thumbnail=thumbnails).save_to_disk(tmp_path / "one")
    with pytest.raises(
        ValueError, match=r"has 2 columns of type Image; its columns are image, label, coarse, thumbnail: name"
    ):
        hub_images(tmp_path / "one", split=HALF)
    with pytest.raises(ValueError, match=r"has 2 columns of labels; .* data.label_column"):
        hub_images(tmp_path / "one", split=HALF, columns=Columns("image"))
    splits = hub_images(tmp_path / "one", tmp_path / "one", columns=Columns("thumbnail", "coarse"))
    assert splits.classes == ("small", "large")
    assert contents(splits)[0] == {100: 0, 101: 0, 102: 1, 103: 1}


def test_parquet_of_bytes_alone_is_read(tmp_path: Path) -> None:
    features = {"image": datasets.Value("binary"), "label": datasets.Value("string")}
    make(4, features, image=[picture(i) for i in range(4)], label=list("abab")).to_parquet(tmp_path / "x.parquet")
    splits = hub_images(tmp_path, tmp_path, columns=Columns("image"))
    assert contents(splits)[0] == {0: 0, 1: 1, 2: 0, 3: 1}


def test_a_path_in_a_table_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(9))
    elsewhere = ["/etc/secret.png", "https://example.org/x.png", "secret.png", "../secret.png"]
    table = make(4, image=[{"bytes": None, "path": path} for path in elsewhere]).data.table
    parquet.write_table(table, tmp_path / "x.parquet")  # datasets' own writer would fetch the pictures
    splits = hub_images(tmp_path, tmp_path)
    for index, path in enumerate(elsewhere):
        says = (
            rf"in row {index} of '{re.escape(str(tmp_path))}': it holds only the path '{path}', which is not followed: "
        )
        with pytest.raises(ValueError, match=says + "save_to_disk puts"):
            splits.train[index]
    with pytest.raises(ValueError, match=r"8 of 8 images cannot be read") as listed:
        verify_images(splits)
    assert str(listed.value).count("in row 1 of") == 2, "once for each part"


def test_what_a_folder_says_beside_its_tables_is_not_read(tmp_path: Path) -> None:
    root = tmp_path / "one"
    make().save_to_disk(root)
    outside = tmp_path / "outside"
    make(7).save_to_disk(outside)
    state = json.loads((root / "state.json").read_text())
    state["_data_files"] = [{"filename": "../outside/data-00000-of-00001.arrow"}]
    state["_format_type"], state["_format_kwargs"] = "no such format", {"a": 1}
    (root / "state.json").write_text(json.dumps(state))
    (root / "one.py").write_text("raise SystemExit")
    (root / "cache-1234.arrow").write_bytes(b"half")
    assert len(hub_images(root, root).train) == 4  # type: ignore[arg-type]


def test_pictures_that_cannot_be_read_are_listed_by_their_rows(tmp_path: Path) -> None:
    data = (picture(0), b"", b"no image", picture(3))
    make(image=[{"bytes": each, "path": None} for each in data]).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"4 of 8 images cannot be read(.|\n)*in row 1 of '.*one': it is empty"):
        verify_images(hub_images(tmp_path / "one", tmp_path / "one"))


def damaged(root: Path) -> None:
    one_table(root)
    (path,) = root.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:100])


def no_parquet(root: Path) -> None:
    root.mkdir()
    (root / "x.parquet").write_bytes(b"no parquet")


def two_kinds(root: Path) -> None:
    parts_of_the_hub(root, "validation")
    make(2).to_parquet(root / "data" / "more.parquet")


def other_columns(root: Path) -> None:
    one_parquet(root)
    make(2).rename_column("label", "kind").to_parquet(root / "more.parquet")


def no_rows(root: Path) -> None:
    root.mkdir()
    make(0).to_parquet(root / "x.parquet")


def without_label(root: Path) -> None:
    make(4, label=[0, 1, -1, 1]).save_to_disk(root)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda root: None, "no folder"),
    "no tables": (Path.mkdir, r"has neither .arrow nor .parquet files: .*data.source=csv"),
    "a damaged table": (damaged, "its tables cannot be read"),
    "no Parquet": (no_parquet, "its tables cannot be read"),
    "a table of no part": (two_kinds, "has the part 'train', but .*more.parquet' belongs to no part"),
    "tables of other columns": (other_columns, "its tables cannot be read"),
    "no rows": (no_rows, "has 0 rows|corresponds to no data"),
    "no pictures": (
        lambda root: make(4).remove_columns("image").save_to_disk(root),
        "has 0 columns of type Image; its columns are label: name that of the pictures with data.image_column",
    ),
    "no labels": (lambda root: make(4).remove_columns("label").save_to_disk(root), "has 0 columns of labels"),
    "a label of -1": (without_label, "row 2 has the label -1, which is none of the 2 classes"),
    "labels that are fractions": (
        lambda root: make(2, {**FEATURES, "label": datasets.Value("float32")}, label=[0.5, 1.5]).save_to_disk(root),
        "row 0 has the label 0.5, which is neither a text nor a number",
    ),
    "no label": (
        lambda root: make(2, {**FEATURES, "label": datasets.Value("string")}, label=["a", None]).save_to_disk(root),
        "row 1 has the label None, which is neither a text nor a number",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, kind: str) -> None:
    save, message = WRONG[kind]
    save(tmp_path / "photos")
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"'{tmp_path / 'photos'}'.*{message}|{message}"
    ) as caught:
        hub_images(tmp_path / "photos", split=HALF)
    assert str(tmp_path / "photos") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_other_classes_to_validate_on_are_refused(tmp_path: Path) -> None:
    make().save_to_disk(tmp_path / "one")
    make(4, {**FEATURES, "label": datasets.ClassLabel(names=["cat", "dog"])}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"validation labels of .*other' are not those of the training data in .*one'"):
        hub_images(tmp_path / "one", tmp_path / "other")


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_table(tmp_path / "one")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"data.source=hf needs datasets: pip install 'ecanet\[hf\]'"):
        hub_images(tmp_path / "one", split=HALF)
