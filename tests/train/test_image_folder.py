"""Folders of images: which of them are trained on and validated on, and what is said about those that are wrong."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import default_collate

from ecanet.train.data import Split, image_folder, verify_images
from ecanet.train.data.splits import number_classes, split_off


def write_image(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_folder(root: Path) -> Path:
    """Two classes with two training images and one validation image each."""
    for name, value in (("cat", 0), ("dog", 100)):
        write_image(root / "train" / name / "a.png", (value, 0, 0))
        write_image(root / "train" / name / "b.png", (value, 1, 0))
        write_image(root / "val" / name / "c.png", (value, 2, 0))
    return root


def write_classes(root: Path, **counts: int) -> Path:
    """So many images in the folder of each class."""
    for name, count in counts.items():
        for i in range(count):
            write_image(root / name / f"{i:03}.png")
    return root


def files(images) -> set[str]:
    return {Path(path).name for path, _ in images.samples}


def names(path: Path) -> str:
    """A pattern for ``pytest.raises(match=...)``: the message names this path."""
    return re.escape(str(path))


class TestImageFolder:
    def test_sorted_classes_and_files(self, tmp_path):
        splits = image_folder(write_folder(tmp_path))
        assert splits.classes == ("cat", "dog")
        assert [splits.train[i][0][:2, 0, 0].tolist() for i in range(len(splits.train))] == [
            [0, 0],
            [0, 1],
            [100, 0],
            [100, 1],
        ]
        assert [splits.train[i][1] for i in range(len(splits.train))] == [0, 0, 1, 1]
        assert [splits.val[i][1] for i in range(len(splits.val))] == [0, 1]
        assert splits.val[1][0].shape == (3, 4, 6)

    def test_root_as_a_string_and_batches(self, tmp_path):
        train = image_folder(str(write_folder(tmp_path))).train
        images, labels = default_collate([train[0], train[3]])
        assert images.shape == (2, 3, 4, 6)
        assert labels.tolist() == [0, 1]

    def test_takes_images_at_any_depth_by_suffix_in_any_case(self, tmp_path):
        cat = write_folder(tmp_path) / "train" / "cat"
        write_image(cat / "deep" / "deeper" / "D.JPEG")
        write_image(cat / "E.Png")
        (cat / "notes.txt").write_text("no image")
        assert [Path(path).name for path, label in image_folder(tmp_path).train.samples if label == 0] == [
            "E.Png",
            "a.png",
            "b.png",
            "D.JPEG",
        ]

    def test_skips_hidden_files_and_folders(self, tmp_path):
        train = write_folder(tmp_path) / "train"
        (train / "cat" / "._a.png").write_bytes(b"what macOS leaves behind")
        write_image(train / "cat" / ".thumbnails" / "a.png")
        write_image(train / ".ipynb_checkpoints" / "a.png")
        splits = image_folder(tmp_path)
        verify_images(splits)
        assert splits.classes == ("cat", "dog")
        assert len(splits.train) == 4

    @pytest.mark.parametrize(
        ("split", "message"),
        [("train", "has 'val', but nothing to train on: add train"), ("val", "has no images to validate on: add val")],
    )
    def test_missing_split_is_named(self, tmp_path, split, message):
        (write_folder(tmp_path) / split).rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match=f"the folder '{names(tmp_path)}' {message}"):
            image_folder(tmp_path)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_split_without_class_folders_is_named(self, tmp_path, split):
        folder = write_folder(tmp_path) / split
        folder.rename(tmp_path / "elsewhere")
        write_image(folder / "a.png")
        with pytest.raises(ValueError, match=f"'{names(folder)}' has no class folders: put its images in"):
            image_folder(tmp_path)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_class_without_images_is_named(self, tmp_path, split):
        folder = write_folder(tmp_path) / split / "dog"
        for file in folder.iterdir():
            file.rename(file.with_suffix(".txt"))
        with pytest.raises(ValueError, match=f"no images in the class folder '{names(folder)}': add some.*or remove"):
            image_folder(tmp_path)

    def test_class_missing_in_val_is_named(self, tmp_path):
        val = write_folder(tmp_path) / "val"
        (val / "cat").rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"'{names(val)}' lacks classes of .*: 'cat'. Add folders"):
            image_folder(tmp_path)

    def test_class_missing_in_train_is_named(self, tmp_path):
        val = write_folder(tmp_path) / "val"
        write_image(val / "bird" / "a.png")
        with pytest.raises(ValueError, match=f"'{names(val)}' has classes that .* lacks: 'bird'. Remove them"):
            image_folder(tmp_path)

    def test_damaged_image_is_named_when_it_is_asked_for(self, tmp_path):
        bad = write_folder(tmp_path) / "train" / "cat" / "b.png"
        bad.write_bytes(bad.read_bytes()[:40])
        train = image_folder(tmp_path).train
        assert train[0][1] == 0
        with pytest.raises(ValueError, match=f"cannot read the image '{names(bad)}'"):
            train[1]


class TestVerify:
    @pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "redirected"])
    def test_passes_good_folders_with_a_progress_bar_where_somebody_looks_on(
        self, tmp_path, capsys, monkeypatch, terminal
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        verify_images(image_folder(write_folder(tmp_path)))
        assert ("verifying images" in capsys.readouterr().err) == terminal

    def test_lists_every_damaged_image_of_both_splits(self, tmp_path):
        root = write_folder(tmp_path)
        bad = [root / "train" / "cat" / "b.png", root / "train" / "dog" / "a.png", root / "val" / "dog" / "c.png"]
        bad[0].write_bytes(b"")
        bad[1].write_bytes(bad[1].read_bytes()[:40])
        bad[2].unlink()
        bad[2].symlink_to("nowhere.png")
        with pytest.raises(ValueError, match="3 of 6 images cannot be read, remove or replace them") as caught:
            verify_images(image_folder(root))
        listed = str(caught.value).splitlines()[1:]
        assert [line.split("'")[1] for line in listed] == [str(path) for path in bad]

    def test_lists_the_first_20_and_a_count(self, tmp_path):
        cat = write_folder(tmp_path) / "train" / "cat"
        for i in range(25):
            (cat / f"bad{i:02}.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match="25 of 31 images") as caught:
            verify_images(image_folder(tmp_path))
        listed = str(caught.value).splitlines()[1:]
        assert len(listed) == 21
        assert "bad19.jpg" in listed[19]
        assert listed[20].strip() == "and 5 more"

    def test_without_tqdm_says_how_to_get_it(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(ModuleNotFoundError, match=r"verify_images needs tqdm: pip install 'ecanet\[train\]'"):
            verify_images(image_folder(write_folder(tmp_path)))


class TestWhereValidationIs:
    @pytest.mark.parametrize("name", ["val", "validation", "valid", "test", "testing", "Validation", "TEST"])
    @pytest.mark.parametrize("train", ["train", "Training"])
    def test_the_usual_names_will_do(self, tmp_path, name, train):
        (write_folder(tmp_path) / "val").rename(tmp_path / name)
        (tmp_path / "train").rename(tmp_path / train)
        splits = image_folder(tmp_path)
        assert (files(splits.train), files(splits.val)) == ({"a.png", "b.png"}, {"c.png"})

    def test_test_stays_for_testing_where_there_is_a_validation_folder(self, tmp_path):
        write_classes(write_folder(tmp_path) / "test", cat=9, dog=9)
        assert files(image_folder(tmp_path).val) == {"c.png"}

    def test_test_stays_for_testing_where_a_fraction_is_split_off(self, tmp_path):
        (write_folder(tmp_path) / "val").rename(tmp_path / "test")
        assert files(image_folder(tmp_path, split=Split(0.5)).val) <= {"a.png", "b.png"}

    def test_two_validation_folders_are_a_question(self, tmp_path):
        shutil.copytree(write_folder(tmp_path) / "val", tmp_path / "valid")
        with pytest.raises(
            ValueError, match=r"has 'val' and 'valid': choose the one to validate on with data.val_root"
        ):
            image_folder(tmp_path)
        assert files(image_folder(tmp_path, tmp_path / "valid").val) == {"c.png"}

    def test_val_root_goes_before_the_folder_s_own(self, tmp_path):
        write_folder(tmp_path / "photos")
        write_classes(tmp_path / "others", cat=3, dog=1)
        splits = image_folder(tmp_path / "photos", tmp_path / "others")
        assert (files(splits.train), len(splits.val)) == ({"a.png", "b.png"}, 4)

    def test_the_folder_s_children_may_be_the_classes(self, tmp_path):
        write_classes(tmp_path / "photos", cat=3, dog=2)
        write_classes(tmp_path / "others", cat=1, dog=1)
        splits = image_folder(tmp_path / "photos", tmp_path / "others")
        assert (splits.classes, len(splits.train), len(splits.val)) == (("cat", "dog"), 5, 2)
        with pytest.raises(FileNotFoundError, match=r"no images to validate on: .* let data.val_fraction=0.1"):
            image_folder(tmp_path / "photos")

    def test_a_class_may_be_called_train(self, tmp_path):
        splits = image_folder(write_classes(tmp_path, car=4, bus=4, train=4), split=Split(0.25))
        assert splits.classes == ("bus", "car", "train")

    @pytest.mark.parametrize("parts", [("val",), ("train", "valid"), ("train", "val", "test")])
    def test_another_folder_to_validate_on_may_hold_parts(self, tmp_path, parts):
        write_classes(tmp_path / "photos", cat=3, dog=2)
        for count, part in enumerate(parts, 1):
            write_classes(tmp_path / "others" / part, cat=count, dog=1)
        splits = image_folder(tmp_path / "photos", tmp_path / "others")
        assert len(splits.val) == (2 if parts == ("val",) else 3)

    def test_a_file_in_place_of_the_folder_is_told_its_source(self, tmp_path):
        (tmp_path / "labels.csv").write_text("file,label\n")
        for arguments in ((tmp_path / "labels.csv",), (write_folder(tmp_path), tmp_path / "labels.csv")):
            with pytest.raises(NotADirectoryError, match=r"labels.csv' is a file, .* a CSV file is data.source=csv"):
                image_folder(*arguments)

    def test_pictures_of_formats_that_are_not_read_are_counted_and_said(self, tmp_path):
        root = write_folder(tmp_path)
        for name in ("IMG_1.HEIC", "IMG_2.heic", "b.avif", "notes.txt"):
            (root / "train" / "cat" / name).write_bytes(b"x")
        write_image(root / "train" / "dog" / "c.jpg").rename(root / "train" / "dog" / "c.jfif")
        says = rf"^'{names(root / 'train')}' has pictures .* left out: 1 \.avif, 2 \.heic\."
        with pytest.warns(UserWarning, match=says):
            splits = image_folder(root)
        assert files(splits.train) == {"a.png", "b.png", "c.jfif"}
        verify_images(splits)

    def test_a_missing_root_is_named(self, tmp_path):
        for arguments in ((tmp_path / "nothing",), (write_folder(tmp_path), tmp_path / "nothing")):
            with pytest.raises(FileNotFoundError, match=f"no folder '{names(tmp_path / 'nothing')}'"):
                image_folder(*arguments)

    def test_a_fraction_and_a_validation_folder_contradict_one_another(self, tmp_path):
        with pytest.raises(ValueError, match=r"data.val_fraction=0.1 .* has 'val': leave data.val_fraction out"):
            image_folder(write_folder(tmp_path), split=Split(0.1))

    def test_a_single_class_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="has one class, 'cat': two or more are needed"):
            image_folder(write_classes(tmp_path, cat=4), split=Split(0.1))


COUNTS = {"cat": 100, "dog": 41, "ape": 2}


class TestSplitOff:
    @pytest.mark.parametrize(
        ("fraction", "held"), [(0.1, (1, 10, 4)), (0.5, (1, 50, 20)), (0.001, (1, 1, 1)), (0.999, (1, 99, 40))]
    )
    def test_takes_the_fraction_of_each_class_but_one_at_least_and_not_all(self, tmp_path, fraction, held):
        splits = image_folder(write_classes(tmp_path, **COUNTS), split=Split(fraction))
        labels = [label for _, label in splits.val.samples]
        assert tuple(labels.count(label) for label in range(3)) == held
        assert not set(splits.train.samples) & set(splits.val.samples)
        assert len(splits.train) + len(splits.val) == 143

    def test_depends_on_the_seed_and_not_on_the_place(self, tmp_path, monkeypatch):
        write_classes(tmp_path / "one" / "train", cat=40, dog=40)
        shutil.copytree(tmp_path / "one" / "train", tmp_path / "two")
        monkeypatch.chdir(tmp_path / "two")
        held = {
            tuple(Path(path).parts[-2:] for path, _ in image_folder(root, split=Split(0.2, seed)).val.samples)
            for root, seed in ((tmp_path / "one", 0), (tmp_path / "two", 0), (".", 0), ("../one", 0))
        }
        assert len(held) == 1
        assert held != {tuple(Path(path).parts[-2:] for path, _ in image_folder(".", split=Split(0.2, 1)).val.samples)}

    def test_an_image_more_moves_one_other_at_most(self):
        keys, labels = [f"{i}.png" for i in range(1000)], [0] * 1000
        _, before = split_off(keys, labels, ["cat"], Split(0.1))
        for more in range(20):
            _, after = split_off([f"new{more}", *keys], [0, *labels], ["cat"], Split(0.1))
            assert len(set(before) ^ {i - 1 for i in after}) <= 2

    def test_a_class_of_one_image_is_named(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"data.val_fraction needs two images or more of each class, .* one of ape"
        ):
            image_folder(write_classes(tmp_path, cat=4, ape=1), split=Split(0.1))

    def test_with_several_labels_the_rarest_counts(self):
        labels = [(0,)] * 20 + [(0, 1)] * 10 + [(0, 1, 2)] * 2 + [()] * 10 + [(3,)]
        train, held = split_off([str(i) for i in range(43)], labels, "abcd", Split(0.5))
        assert [sum(labels[i] == kind for i in held) for kind in dict.fromkeys(labels)] == [10, 5, 1, 5, 0]
        assert sorted(train + held) == list(range(43))


def test_classes_that_are_whole_numbers_are_sorted_by_value():
    assert number_classes(["10", "9", "0", "9"]) == ["0", "9", "10"]
    assert number_classes(["10", "9", "cat"]) == ["10", "9", "cat"]
