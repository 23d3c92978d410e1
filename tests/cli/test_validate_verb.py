"""`ecanet validate` and `ecanet explain`: what is printed, drawn and written of a trained network."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecanet.cli import main
from ecanet.cli.validate import _table
from ecanet.train import Validation, load_trained, validate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("validate") / "out"
    words = ["--data.source", "image_folder", "--data.root", str(image_folder), "--data.image_size", "12"]
    words += ["--data.resize", "12", "--model.gate", "se", "--model.options", '{"widths": [4]}']
    main(
        ["fit", *words, "--out", str(out), "--optim.epochs", "1", "--optim.lr", "0.01", "--trainer.accelerator", "cpu"]
    )
    return out


def test_validate_prints_the_classes_from_the_worst_on_and_what_they_are_taken_for(run: Path, capsys) -> None:
    main(["validate", str(run), "--accelerator", "cpu"])
    said = capsys.readouterr().out.splitlines()
    result = validate(run)
    assert said[:2] == [f"val/top1: {result.metrics['val/top1']:.2f} %", "val/top3: 100.00 %"]
    assert (said[3], said[4]) == ("", f"{'class':30}   top-1 %   images  most often taken for")
    rows = [line.split() for line in said[5:]]
    accuracy = dict(zip(result.classes, result.of_each_class().tolist(), strict=True))
    assert [row[0] for row in rows] == sorted(accuracy, key=accuracy.__getitem__)
    for name, top1, images, *taken in rows:
        assert (float(top1), images) == (pytest.approx(accuracy[name], abs=0.01), "6")
        missed = result.predicted[(result.labels == result.classes.index(name))]
        missed = missed[missed != result.classes.index(name)]
        assert taken[:1] == ([] if not len(missed) else [result.classes[int(missed.bincount().argmax())]])


def of(labels: list[int], predicted: list[int], classes: int) -> Validation:
    names = [f"class {index}" for index in range(classes)]
    return Validation({"val/top1": 50.0}, names, torch.tensor(labels), torch.tensor(predicted))


def test_of_a_thousand_classes_the_worst_are_printed_and_the_others_in_a_line() -> None:
    labels = [index for index in range(990) for _ in range(10)]
    predicted = [index if place % 10 >= index % 7 else index + 1 for place, index in enumerate(labels)]
    lines = _table(of(labels, predicted, 1000))
    assert len(lines) == 22
    assert lines[1] == f"{'class 6':30}     40.00       10  class 7 (60.0 %)"
    assert lines[-2:] == [
        "and 971 more classes, 40.00 to 100.00 %: --out FILE.json has all",
        "without images: 10 classes",
    ]
    assert len(_table(of(list(range(20)), [0] * 20, 20))) == 21, "twenty are printed whole"
    assert all(len(line) <= 80 for line in lines)


def test_a_name_cannot_move_the_cursor_and_a_long_one_is_shortened() -> None:
    result = of([0, 0, 1], [0, 1, 1], 2)
    result.classes[:] = ["\x1b[2J" + "a" * 100, "b\nc"]
    first, second = _table(result)[1:]
    assert first.startswith("\\x1b[2J")
    assert first.endswith("b\\nc (50.0 %)")
    assert second.startswith("b\\nc")


def test_the_confusion_matrix_is_a_table_and_a_picture(run: Path, tmp_path: Path, capsys) -> None:
    folder, before = tmp_path / "new" / "confusion", sorted(path.name for path in run.iterdir())
    main(["validate", str(run), "--confusion", str(folder), "--accelerator", "cpu"])
    assert capsys.readouterr().out.endswith(f"wrote {folder / 'confusion.csv'} and {folder / 'confusion.png'}\n")
    with (folder / "confusion.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head == ["class", "bag", "boot", "coat"]
    assert [row[0] for row in rows] == head[1:]
    assert [[int(cell) for cell in row[1:]] for row in rows] == validate(run).confusion().tolist()
    with Image.open(folder / "confusion.png") as picture:
        assert picture.width == 1800
    assert sorted(path.name for path in run.iterdir()) == before, "nothing is written beside the run"


def test_all_numbers_are_written_as_json(run: Path, tmp_path: Path, monkeypatch) -> None:
    main(["validate", str(run), "--out", str(tmp_path / "metrics.json"), "--accelerator", "cpu"])
    written = json.loads((tmp_path / "metrics.json").read_text())
    result = validate(run)
    assert written["metrics"] == result.metrics
    assert written["classes"][1] == {"class": "boot", "images": 6, "top1": float(result.of_each_class()[1])}
    empty = Validation({"val/loss": float("nan")}, ["a", "b"], torch.tensor([0]), torch.tensor([0]))
    monkeypatch.setattr("ecanet.cli.validate.validate", lambda *_: empty)
    main(["validate", str(run), "--out", str(tmp_path / "metrics.json")])
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written["metrics"] == {"val/loss": None}
    assert [row["top1"] for row in written["classes"]] == [100.0, None]


def test_files_are_written_also_where_a_reader_such_as_head_has_seen_enough(run: Path, tmp_path, monkeypatch) -> None:
    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    folder, out = tmp_path / "confusion", tmp_path / "metrics.json"
    with pytest.raises(SystemExit):
        main(["validate", str(run), "--accelerator", "cpu", "--confusion", str(folder), "--out", str(out)])
    assert json.loads(out.read_text())["metrics"]
    assert sorted(path.name for path in folder.iterdir()) == ["confusion.csv", "confusion.png"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code not in (0, None)
    return f"{stopped.value.code} {capsys.readouterr().err}"


def test_mistakes_are_named_before_the_network_runs(
    run: Path, image_folder: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("ecanet.cli.validate.validate", lambda *_: pytest.fail("it runs"))
    monkeypatch.setattr("ecanet.cli.explain.explain_prediction", lambda *_: pytest.fail("it runs"))
    monkeypatch.setattr("ecanet.cli.predict.predict", lambda *_, **__: pytest.fail("it runs"))
    image, file = str(image_folder / "val" / "bag" / "00.png"), tmp_path / "file"
    file.write_text("")
    assert "--confusion must be a folder" in refused(["validate", str(run), "--confusion", str(file)], capsys)
    said = refused(["validate", str(run), "--confusion", str(tmp_path / "new.png")], capsys)
    assert "--confusion must be a folder, for confusion.png and confusion.csv, got " in said
    assert "did you mean 'image_folder'?" in refused(["validate", str(run), "--source", "imagefolder"], capsys)
    assert "did you mean 'cpu'?" in refused(["validate", str(run), "--accelerator", "cpus"], capsys)
    said = refused(["explain", str(run), image, "--out", str(tmp_path / "a.jpg")], capsys)
    assert "--out must end in one of png, pdf, svg, got 'a.jpg'" in said
    (folder := tmp_path / "folder.png").mkdir()
    for verb in (["validate", str(run)], ["explain", str(run), image], ["predict", str(run), image]):
        said = refused([*verb, "--out", str(folder)], capsys)
        assert f"ecanet {verb[0]}: IsADirectoryError: --out must be a file, and {folder} is a folder" in said
    folder.rmdir()
    monkeypatch.setattr("ecanet.cli.validate._MAX_CLASSES", 2)
    said = refused(["validate", str(run), "--confusion", str(tmp_path / "new")], capsys)
    assert "a matrix of 3 classes has 9 cells, and it is written for up to 2 classes" in said
    assert sorted(tmp_path.iterdir()) == [file]


def test_explain_writes_one_picture_and_says_what_the_image_is_taken_for(run, image_folder, tmp_path, capsys) -> None:
    image, out = image_folder / "val" / "bag" / "00.png", tmp_path / "new" / "picture.png"
    main(["predict", str(run), str(image), "--top", "1", "--accelerator", "cpu"])
    predicted = capsys.readouterr().out
    main(["explain", str(run), str(image), "--out", str(out)])
    said = capsys.readouterr()
    assert said.out == f"{predicted}wrote {out}\n"
    assert said.err == ""
    with Image.open(out) as picture:
        assert picture.width == 1800
        assert np.asarray(picture).std() > 10


def test_explain_draws_no_means_and_says_why_where_the_pictures_of_the_run_are_gone(
    run: Path, image_folder: Path, tmp_path: Path, capsys
) -> None:
    shutil.copy(run / "best.ckpt", tmp_path / "alone.ckpt")
    image = str(image_folder / "val" / "bag" / "00.png")
    main(["explain", str(tmp_path / "alone.ckpt"), image, "--out", str(tmp_path / "without.png")])
    note = capsys.readouterr().err
    assert note.startswith("no means of the class are drawn: ")
    assert note.endswith("--root FOLDER\n")
    main(
        [
            "explain",
            str(tmp_path / "alone.ckpt"),
            image,
            "--root",
            str(image_folder),
            "--out",
            str(tmp_path / "with.png"),
        ]
    )
    assert capsys.readouterr().err == ""
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
    assert load_trained(tmp_path / "alone.ckpt").classes == ["bag", "boot", "coat"]


def test_explain_draws_no_means_where_a_file_has_taken_the_place_of_the_runs_pictures(
    run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotADirectoryError(20, "Not a directory", "photos/val")

    monkeypatch.setattr("ecanet.cli.explain.pictures_for", refuse)
    image = tmp_path / "x.png"
    Image.new("RGB", (12, 12)).save(image)
    main(["explain", str(run), str(image), "--out", str(tmp_path / "out.png")])
    assert "no means of the class are drawn: [Errno 20] Not a directory: 'photos/val'" in capsys.readouterr().err
    assert (tmp_path / "out.png").exists()
