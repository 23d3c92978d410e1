"""Image files and labels from a CSV file, honest ones and others; every mistake is named with its line."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from ecanet.train.data import Columns, Split, Splits, csv_images
from ecanet.train.data.csv_file import MAX_CSV_BYTES, SEPARATORS

HALF = Split(0.5)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Writes images a.png, b.png, ... below in/, and a table of them."""
    for i, name in enumerate("abcdef"):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (i, 0, 0)).save(tmp_path / "in" / f"{name}.png")

    def write(content: str | bytes, name: str = "labels.csv") -> Path:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


PLAIN = "file,label\nin/a.png,cat\nin/b.png,dog\nin/c.png,cat\nin/d.png,dog\n"


def shape_of(splits: Splits) -> tuple[tuple[str, ...], int, int]:
    return splits.classes, len(splits.train), len(splits.val)  # type: ignore[arg-type]


HONEST = {
    "plain": PLAIN,
    "a byte order mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "Windows' lines and paths": PLAIN.replace("\n", "\r\n").replace("/", "\\"),
    "old Mac's lines": PLAIN.replace("\n", "\r"),
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "quotes and spaces": PLAIN.replace("in/a.png,cat", ' in/a.png ," cat "').replace(" in/a.png ,", "in/a.png ,"),
    "other names and columns": "id,path,Class\n" + "".join(f"{i},{x}\n" for i, x in enumerate(PLAIN.split()[1:])),
    "columns in another order": "label,file\ncat,in/a.png\ndog,in/b.png\ncat,in/c.png\ndog,in/d.png",
    "empty lines": PLAIN.replace("\n", "\n\n"),
    "a path with a dot": PLAIN.replace("in/a", "./in//./a"),
}


@pytest.mark.parametrize("kind", HONEST)
def test_tables_as_people_write_them_are_read(table: Callable[..., Path], kind: str) -> None:
    splits = csv_images(table(HONEST[kind]), split=HALF)
    assert shape_of(splits) == (("cat", "dog"), 2, 2)
    seen = {int(image[0, 0, 0]): label for part in splits[:2] for image, label in part}  # type: ignore[attr-defined]
    assert seen == {0: 0, 1: 1, 2: 0, 3: 1}


@pytest.mark.parametrize("held", ["val", "validation", "VALID", "test"])
def test_a_column_may_say_which_images_are_validated_on(table: Callable[..., Path], held: str) -> None:
    rows = ["a.png,cat,train", "b.png,dog,train", f"c.png,cat,{held}"]
    splits = csv_images(table("\n".join(["file,label,split", *(f"in/{row}" for row in rows)])))
    assert shape_of(splits) == (("cat", "dog"), 2, 1)


def test_another_table_may_be_validated_on(table: Callable[..., Path], tmp_path: Path) -> None:
    other = table("file,label\ne.png,dog\n", "in/val.csv")
    splits = csv_images(table(PLAIN), other)
    assert shape_of(splits) == (("cat", "dog"), 4, 1)
    image, label = splits.val[0]
    assert (int(image[0, 0, 0]), label) == (4, 1)
    with pytest.raises(ValueError, match=r"in/val.csv': line 2 has the label 'ape', which no training image has"):
        csv_images(table(PLAIN), table("file,label\ne.png,ape\n", "in/val.csv"))


def test_without_images_to_validate_on_the_ways_are_named(table: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"labels.csv' has no images to validate on: .*data.val_fraction=0.1"):
        csv_images(table(PLAIN))


def test_a_folder_in_place_of_the_table_is_told_its_source(table: Callable[..., Path], tmp_path: Path) -> None:
    for arguments in ((tmp_path,), (table(PLAIN), tmp_path)):
        with pytest.raises(IsADirectoryError, match=r"is a folder, .* class folders are data.source=image_folder"):
            csv_images(*arguments)


SEVERAL = "file,labels\nin/a.png,sea|sky\nin/b.png,sky\nin/c.png,\nin/d.png, sky | sea |\n"


@pytest.mark.parametrize("separator", [word for word in SEPARATORS if word != "none"])
def test_several_labels_in_a_cell_make_the_data_multi_label(table: Callable[..., Path], separator: str) -> None:
    between = SEPARATORS[separator]
    assert between is not None
    cells = (row.split(",") for row in SEVERAL.split("\n") if row)
    content = "".join(f'{file},"{labels.replace("|", between)}"\n' for file, labels in cells)
    splits = csv_images(table(content), split=HALF, columns=Columns(separator=between))
    assert splits.multi_label
    assert splits.classes == ("sea", "sky")
    rows = {int(image[0, 0, 0]): label.tolist() for part in splits[:2] for image, label in part}  # type: ignore
    assert rows == {0: [1, 1], 1: [0, 1], 2: [0, 0], 3: [1, 1]}
    assert splits.train[0][1].dtype == torch.float32


def test_nothing_to_measure_is_named(table: Callable[..., Path]) -> None:
    other = table("file,labels\nf.png,\n", "in/val.csv")
    with pytest.raises(ValueError, match=f"no image to validate on in '{other}' has a label"):
        csv_images(table(SEVERAL), other)


def test_without_a_separator_a_cell_is_one_label(table: Callable[..., Path]) -> None:
    splits = csv_images(table(PLAIN.replace("dog", "AC|DC")), split=HALF, columns=Columns(separator=None))
    assert (splits.classes, splits.multi_label) == (("AC|DC", "cat"), False)


def test_columns_of_any_name_can_be_named(table: Callable[..., Path]) -> None:
    content = PLAIN.replace("file,label", "picture,breed")
    with pytest.raises(ValueError, match=r"no column is called one of file, .*breed. Name one with data.image_"):
        csv_images(table(content), split=HALF)
    assert shape_of(csv_images(table(content), split=HALF, columns=Columns("picture", "breed")))[0] == ("cat", "dog")


def with_row(row: str) -> str:
    return PLAIN + row + "\n"


#: What the file holds, and what is said about it.
WRONG: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "its first line is empty, and must name the columns, as in file,label"),
    "an empty first line": ("\nfile,label\nin/a.png,cat\n", "its first line is empty"),
    "a header alone": ("file,label\n", "has no images"),
    "no header": ("in/a.png,cat\n", "its first line is in/a.png, cat"),
    "two columns of files": ("file,path,label\n", "2 of its columns are called one of file"),
    "no labels": ("file\nin/a.png\n", "no column is called one of label"),
    "an absolute path": (with_row("/etc/passwd,cat"), "line 6: the path '/etc/passwd' must be relative"),
    "a path out of the folder": (with_row("../x.png,cat"), r"line 6: the path '\.\./x.png' must .* not leave it"),
    "a path out in the middle": (with_row("in/../../x.png,cat"), "line 6: the path .* must not leave it"),
    "Windows' way out": (with_row("in\\..\\..\\x.png,cat"), "line 6: the path .* must not leave it"),
    "a drive": (with_row("C:\\x.png,cat"), "line 6: the path 'C:/x.png' must be relative"),
    "a drive's own folder": (with_row("C:x.png,cat"), "line 6: the path 'C:x.png' must be relative"),
    "a share": (with_row("\\\\host\\x.png,cat"), "line 6: the path '//host/x.png' must be relative"),
    "no file": (with_row(",cat"), "line 6: it must name an image file"),
    "NUL in a path": (with_row("in/a\0.png,cat"), "line 6: (it must name an image file|line contains NUL)"),
    "NUL in a label": (with_row("in/e.png,c\0t"), "line 6: (a label must be text|line contains NUL)"),
    "escape codes in a label": (with_row("in/e.png,\x1b[2J"), r"got '\\x1b\[2J'"),
    "a line break in a label": (with_row('in/e.png,"a\nb"'), r"line 7: a label must be text .* got 'a\\nb'"),
    "a long label": (with_row("in/e.png," + "x" * 201), "line 6: a label must be text of at most 200 characters"),
    "a formula": (with_row("in/e.png,=1+1"), "line 6: the label '=1\\+1' starts like a formula"),
    "a command": (with_row("in/e.png,\"@SUM(1+9)*cmd|' /C calc'!A0\""), "line 6: the label .* starts like a formula"),
    "a cell too many": (with_row("in/e.png,cat,dog"), "line 6 has 3 cells, and the first line 2"),
    "a cell too few": (with_row("in/e.png"), "line 6 has 1 cells, and the first line 2"),
    "an unknown part": (
        "file,label,split\nin/a.png,cat,train\nin/b.png,dog,\n",
        "line 3: split must be one of train, training, val, validation, valid, test, testing, got ''",
    ),
    "no label": (with_row("in/e.png,"), "line 6 has no label, which only data with several labels"),
    "a file twice": (with_row("./in/a.png,dog"), "line 6: 'in/a.png' is already in line 2"),
    "one class": ("file,label\nin/a.png,cat\nin/b.png,cat\n", "has one class, 'cat'"),
    "UTF-16": (PLAIN.encode("utf-16"), "is not UTF-8"),
    "Latin-1": (PLAIN.replace("cat", "Käfer").encode("latin-1"), "is not UTF-8"),
    "a quote that never ends": (with_row('in/e.png,"cat') + "x" * 200_000, "field larger than field limit"),
    "text behind a quote": (with_row('in/e.png,"cat"x'), "line 6: ',' expected after"),
    "a huge cell": (with_row("in/e.png," + "x" * 200_000), "line 6: field larger than field limit"),
    "a huge header": ("x" * 2**20, "field larger than field limit"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is not UTF-8"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_with_its_line(table: Callable[..., Path], kind: str) -> None:
    content, message = WRONG[kind]
    path = table(content)
    with pytest.raises(ValueError, match=f"^'{path}'.*{message}") as caught:
        csv_images(path, split=HALF)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("label", ["-1", "+1", "-1.5e3", "1"])
def test_numbers_are_no_formulas(table: Callable[..., Path], label: str) -> None:
    assert label in csv_images(table(PLAIN.replace("cat", label)), split=HALF).classes


@pytest.mark.parametrize(
    "path", ["in/gone.png", "http:/example.org/x.png", "~/x.png", "in", "in/a.png/x", "in/pipe.png"]
)
def test_what_is_no_file_is_listed_before_training(table: Callable[..., Path], tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "in" / "pipe.png")
    root = table(with_row(f"{path},cat"))
    with pytest.raises(FileNotFoundError, match=f"1 of 5 images that '{root}' lists are not in its folder: {path}"):
        csv_images(root, split=HALF)


def test_links_are_followed_as_in_folders(table: Callable[..., Path], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "labels.csv").write_text("file,label\nx.png,cat\ny.png,dog\nz.png,cat\nw.png,dog\n")
    table(PLAIN)
    for link, name in zip("xyzw", "abcd", strict=True):
        (outside / f"{link}.png").symlink_to(tmp_path / "in" / f"{name}.png")
    splits = csv_images(outside / "labels.csv", split=HALF)
    assert sum(int(image[0, 0, 0]) for part in splits[:2] for image, _ in part) == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["nothing", "folder", "pipe"])
def test_what_is_no_table_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "labels.csv"
    if kind != "nothing":
        (Path.mkdir if kind == "folder" else os.mkfifo)(path)
    with pytest.raises((OSError, ValueError), match=f"(no such file: )?{path}"):
        csv_images(path)


def test_a_huge_table_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    with path.open("wb") as file:
        file.truncate(MAX_CSV_BYTES + 1)
    with pytest.raises(ValueError, match="134,217,729 bytes, more than the 134,217,728 allowed"):
        csv_images(path)


def test_missing_images_are_counted_in_little_time_and_memory(
    table: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecanet.train.data.csv_file.MAX_ROWS", 20_000)
    path = table(PLAIN + "".join(f"{i},cat\n" for i in range(19_996)))
    begun, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileNotFoundError, match=r"19996 of 20000 images .* and 19976 more"):
        csv_images(path, split=HALF)
    assert time.process_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50 * 2**10  # KiB
    path.write_text(path.read_text() + "one more,cat\n")
    with pytest.raises(ValueError, match="it has more than 20,000 images: split it"):
        csv_images(path, split=HALF)
