"""Folders of images in circles, output folders that are shared, filled or removed."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hostile_pictures import NO_FILES, symlink_to
from PIL import Image

from ecanet.cli import main
from ecanet.files.atomic import remove_partial_files, write_whole
from ecanet.files.state_dicts import safe_save
from ecanet.train import Recipe, fit
from ecanet.train.checkpoint import SafeCheckpointIO
from ecanet.train.classifier import Classifier
from ecanet.train.data import Splits, verify_images
from ecanet.train.data import image_folder as read_folder
from ecanet.train.data.pictures import image_files
from ecanet.train.evaluate import predict
from ecanet.train.run_folder import FILES_OF_A_RUN, RunFolder
from tests.fresh import FreshProcess

CIRCLES: dict[str, Callable[[Path], None]] = {
    "link to its own folder": lambda cat: (cat / "a").symlink_to("."),
    "ten links to its own folder": lambda cat: [(cat / f"a{i}").symlink_to(".") for i in range(10)] and None,
    "link to the folder above": lambda cat: (cat / "a").symlink_to(".."),
    "link to the root of all": lambda cat: (cat / "a").symlink_to("/"),
    "absolute link": lambda cat: (cat / "a").symlink_to(cat),
    "link to itself": lambda cat: (cat / "a").symlink_to("a"),
    "two links to each other": lambda cat: [(cat / a).symlink_to(b) for a, b in ("ab", "ba")] and None,
    "two folders that link to each other": lambda cat: (
        [((cat / a).mkdir(), (cat / a / "to").symlink_to(f"../{b}")) for a, b in ("ab", "ba")] and None
    ),
    "link into nothing": lambda cat: (cat / "a").symlink_to("nowhere"),
    "circle by a name of a picture": lambda cat: (cat / "a.png").symlink_to("."),
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, an image each in train and val."""
    root = tmp_path / "photos"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (6, 4)).save(root / split / name / "x.png")
    return root


def read_and_verify(root: Path) -> Splits:
    splits = read_folder(root)
    verify_images(splits)
    return splits


@pytest.mark.parametrize("circle", CIRCLES)
def test_every_folder_is_gone_through_once(photos: Path, circle: str) -> None:
    CIRCLES[circle](photos / "train" / "cat")
    assert [path for path, _ in read_and_verify(photos).train.samples] == [  # type: ignore[attr-defined]
        str(photos / "train" / name / "x.png") for name in ("cat", "dog")
    ]


@pytest.mark.parametrize("target", [".", "..", "../.."], ids=["the split", "the root", "above the root"])
def test_a_class_that_is_a_link_to_what_holds_it_is_named(photos: Path, target: str) -> None:
    (photos / "train" / "loop").symlink_to(target)
    (photos / "val" / "loop").symlink_to(target)
    with pytest.raises(ValueError, match=r"class folder '.*loop' is a link to a folder that contains it: remove it"):
        read_folder(photos)


def test_links_to_other_folders_and_files_are_followed_once(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "elsewhere" / "y.png")
    for name in ("one", "two"):
        (photos / "train" / "cat" / name).symlink_to(tmp_path / "elsewhere")
    (photos / "train" / "cat" / "z.png").symlink_to(tmp_path / "elsewhere" / "y.png")
    (photos / "train" / "bird").symlink_to(tmp_path / "elsewhere")
    cat = photos / "train" / "cat"
    assert sorted(image_files(cat)) == [str(cat / name) for name in ("one/y.png", "x.png", "z.png")]
    assert list(image_files(photos / "train" / "bird")) == [str(photos / "train" / "bird" / "y.png")]


@pytest.mark.parametrize("way", ["..", "../cat", ".", "../../train/cat"])
def test_a_folder_may_be_named_by_any_way_to_it(photos: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.chdir(photos / "train" / "cat")
    assert [Path(path).resolve().parent.name for path in sorted(image_files(way))] == ["cat", "dog"][
        : 1 + (way == "..")
    ]


def test_a_folder_named_like_a_picture_is_a_folder(photos: Path) -> None:
    inner = photos / "train" / "cat" / "a.png"
    inner.mkdir()
    Image.new("RGB", (6, 4)).save(inner / "b.png")
    assert sorted(image_files(inner.parent)) == [str(inner / "b.png"), str(inner.parent / "x.png")]


def test_folders_a_thousand_deep_are_gone_through(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos / "train" / "cat")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Image.new("RGB", (6, 4)).save("y.png")
    os.chdir(photos / "train" / "cat")
    assert len(list(image_files("."))) == 2
    subprocess.run(["rm", "-r", "d"], check=True)


def test_a_folder_too_deep_to_list_is_named_and_cut(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos / "train" / "cat")
    for _ in range(25):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    os.chdir(photos / "train" / "cat")
    with pytest.raises(OSError, match=r"cannot list the folder '.*\.\.\.[d/]+': File name too long") as caught:
        list(image_files(photos / "train" / "cat"))
    assert len(str(caught.value)) < 600
    subprocess.run(["rm", "-r", "d" * 200], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list anything")
def test_a_folder_that_may_not_be_listed_is_named(photos: Path) -> None:
    (photos / "train" / "cat" / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError, match="closed"):
        read_folder(photos)


def make_empty(folder: Path, count: int) -> None:
    place = os.open(folder, os.O_RDONLY)
    for i in range(count):
        os.close(os.open(f"{i:06}.png", os.O_CREAT | os.O_WRONLY, dir_fd=place))
    os.close(place)


@pytest.fixture
def in_memory(photos: Path) -> Iterator[Path]:
    """A folder on a file system in memory, where there is one, linked into the photos' training images of cats."""
    with tempfile.TemporaryDirectory(dir=next(filter(os.path.isdir, ["/dev/shm"]), None)) as folder:
        (photos / "train" / "cat" / "many").symlink_to(folder)
        yield Path(folder)


def test_a_hundred_thousand_empty_files_are_listed_and_the_first_is_named(photos: Path, in_memory: Path) -> None:
    make_empty(in_memory, 100_000)
    begun, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train = read_folder(photos).train
    with pytest.raises(ValueError, match=r"000000\.png': it is empty"):
        train[0]
    assert len(train.samples) == 100_002  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # KiB


def test_verify_counts_empty_files_and_names_the_first(photos: Path, in_memory: Path) -> None:
    make_empty(in_memory, 5000)
    with pytest.raises(ValueError, match=r"5000 of 5004 images cannot be read") as caught:
        read_and_verify(photos)
    assert len(str(caught.value).splitlines()) == 22


@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind not in ("folder", "link to a folder")])
def test_verify_lists_what_is_no_file(photos: Path, kind: str) -> None:
    (photos / "train" / "cat" / "below").mkdir()
    NO_FILES[kind][0](photos / "train" / "cat" / "below" / "x.png")
    with pytest.raises(ValueError, match=r"1 of 5 images cannot be read(.|\n)*below/x\.png'"):
        read_and_verify(photos)


def test_no_name_puts_escape_codes_or_lines_into_an_error(photos: Path) -> None:
    for i, name in enumerate(("a\x1b[2J.png", "b\n.png", os.fsdecode(b"c\xff.png"))):
        (photos / "train" / "cat" / name).write_bytes(bytes(i))
    with pytest.raises(ValueError, match="3 of 7") as caught:
        read_and_verify(photos)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("trained")
    command = ["fit", "--out", str(out), "--data.source", "image_folder", "--data.root", str(image_folder)]
    command += ["--data.image_size", "12", "--data.resize", "12", "--model.options", '{"widths": [8, 16]}']
    main([*command, "--trainer.accelerator", "cpu", "--optim.epochs", "1", "--optim.schedule", "constant"])
    return out


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device", "link to itself"])
def test_predict_names_what_is_no_image(
    trained: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    NO_FILES[kind][0](tmp_path / "x.png")
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(trained), str(tmp_path / "x.png")])
    assert str(tmp_path / "x.png") in str(stopped.value.code)
    assert "Traceback" not in str(stopped.value.code) + capsys.readouterr().err


@pytest.mark.parametrize("circle", CIRCLES)
def test_predict_takes_every_image_of_a_folder_once(trained: Path, photos: Path, circle: str) -> None:
    CIRCLES[circle](photos / "train" / "cat")
    assert [p.image.parent.name for p in predict(trained, [photos / "train"])] == ["cat", "dog"]


def test_predict_prints_names_clean_and_writes_them_whole(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = tmp_path / "photos", tmp_path / "table.csv"
    folder.mkdir()
    for name in ("a\x1b[2J.png", "b\n.png", os.fsdecode(b"c\xff.png")):
        Image.new("RGB", (12, 12)).save(folder / name)
    capsys.readouterr()
    main(["predict", str(trained), str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    main(["predict", str(trained), str(folder), "--out", str(table), "--top", "1"])
    assert b"c\xff.png" in table.read_bytes()


def test_a_damaged_image_met_by_a_loading_process_is_one_line(tiny: Callable[..., Recipe], photos: Path) -> None:
    (photos / "train" / "cat" / "bad.png").write_bytes(b"no image")
    recipe = tiny(epochs=1, workers=1)
    recipe = replace(recipe, data=replace(recipe.data, root=photos, batch_size=3, verify=False))
    with pytest.raises(ValueError, match=r"^cannot read the image '.*bad\.png'") as caught:
        fit(recipe, None, progress=False)
    assert len(str(caught.value).splitlines()) == 1


# Output folders


def leave(path: Path, content: bytes = b"half") -> Path:
    path.write_bytes(content)
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_write_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = dead_process()
    for name in ("best.ckpt", "last.ckpt"):
        with monkeypatch.context() as patch:  # as a process of another number, killed before it renamed
            patch.setattr(os, "getpid", lambda: pid)
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                safe_save({}, tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 2
    remove_partial_files(tmp_path, FILES_OF_A_RUN)
    assert not list(tmp_path.iterdir())


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    contents = [bytes([65 + i]) * 1000 for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: [write_whole(tmp_path / "x", content) for _ in range(20)], contents))
    assert (tmp_path / "x").read_bytes() in contents
    assert os.listdir(tmp_path) == ["x"]


def test_own_number_in_an_earlier_life_is_removed(tmp_path: Path) -> None:
    leave(tmp_path / f".last.ckpt.{os.getpid()}.partial")
    remove_partial_files(tmp_path, FILES_OF_A_RUN)
    assert not list(tmp_path.iterdir())


def test_a_pipe_or_a_device_is_refused_and_stays_one(tmp_path: Path) -> None:
    pipe, link = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link):
        with pytest.raises(OSError, match=rf"it is a device or a pipe, not a regular file.*{path.name}"):
            write_whole(path, "text")
        with pytest.raises(OSError, match=rf"cannot write the checkpoint .*{path.name}.*it is a device or a pipe"):
            safe_save({}, path)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_text_that_has_no_bytes_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "history.json", "\udc80")
    assert not list(tmp_path.iterdir())


def test_a_run_writes_no_file_whose_remains_would_stay(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_file("recipe.json", "{}")
    with pytest.raises(AssertionError, match=r"notes\.txt is not in FILES_OF_A_RUN"):
        folder.write_file("notes.txt", "")
    assert os.listdir(tmp_path) == ["recipe.json"]


@pytest.mark.parametrize(
    "name",
    [
        ".notes.partial",
        ".partial",
        "last.ckpt.{pid}.partial",
        ".last.ckpt.partial",
        ".last.ckpt.{pid}.partial.bak",
        ".last.ckpt.{pid}x.partial",
        ".last.ckpt.-{pid}.partial",
        ".last.ckpt.0.partial",
        ".last.ckpt.0{pid}.partial",
        ".last.ckpt.99999999999999999999.partial",
        ".last.ckpt.१२३.partial",
        ".thesis.ckpt.{pid}.partial",
        ".x.last.ckpt.{pid}.partial",
        ".last.ckpt.{pid}.partial\n",
        ".LAST.ckpt.{pid}.partial",
        "download.{pid}.partial",
    ],
)
def test_what_others_made_stays(tmp_path: Path, name: str) -> None:
    path = leave(tmp_path / name.format(pid=dead_process()))
    remove_partial_files(tmp_path, FILES_OF_A_RUN)
    assert path.read_bytes() == b"half"


def test_links_folders_and_files_of_living_processes_stay(tmp_path: Path) -> None:
    pid, target = dead_process(), leave(tmp_path / "precious")
    link, folder = tmp_path / f".last.ckpt.{pid}.partial", tmp_path / f".best.ckpt.{pid}.partial"
    link.symlink_to(target)
    folder.mkdir()
    alive = [leave(tmp_path / f".last.ckpt.{number}.partial") for number in (1, os.getppid())]
    remove_partial_files(tmp_path, FILES_OF_A_RUN)
    assert link.is_symlink()
    assert folder.is_dir()
    assert all(path.exists() for path in (target, *alive))


HOLD = """
import os, sys, time
from pathlib import Path
from ecanet.train.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:  # as a loading process, which outlives its parent
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., FreshProcess]]:
    """Starts a process that holds ``tmp_path / "out"``."""
    started = []

    def start(*arguments: str) -> FreshProcess:
        process = FreshProcess(HOLD, tmp_path / "out", *arguments)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.close()


def test_second_run_in_a_folder_is_refused_in_one_line(
    tiny: Callable[..., Recipe], tmp_path: Path, holder: Callable[..., FreshProcess]
) -> None:
    holder()
    for resume in (False, True):
        with pytest.raises(BlockingIOError, match=f"^another run is writing into {re.escape(str(tmp_path / 'out'))}"):
            fit(tiny(epochs=1), tmp_path / "out", resume=resume, progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_command_line_refuses_a_second_run(
    tmp_path: Path, holder: Callable[..., FreshProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    holder()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--out", str(tmp_path / "out")])
    said = str(stopped.value.code) + capsys.readouterr().err
    assert "another run is writing into" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("arguments", [(), ("with a loading process",)], ids=["alone", "with a loading process"])
def test_killed_process_leaves_no_lock(
    tmp_path: Path, holder: Callable[..., FreshProcess], arguments: tuple[str, ...]
) -> None:
    process = holder(*arguments)
    process.kill()
    process.wait()
    with RunFolder(tmp_path / "out"):
        pass


def test_run_in_the_same_process_is_refused_and_a_later_one_not(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(BlockingIOError), RunFolder(tmp_path):
        pass
    with RunFolder(tmp_path):
        pass


def test_failed_run_unlocks_its_folder(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(epochs=1)
    with pytest.raises(FileNotFoundError):
        fit(replace(recipe, data=replace(recipe.data, root=tmp_path / "nothing")), tmp_path / "a" / "b", progress=False)
    assert not (tmp_path / "a").exists(), "a run that never began leaves no folder"
    fit(recipe, tmp_path / "a" / "b", progress=False)


def test_other_processes_of_a_distributed_run_neither_lock_nor_make(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out", first=False) as other:
        assert not (tmp_path / "out").exists()
        with RunFolder(tmp_path / "out"):
            other.check()


def test_without_locks_runs_go_on_unguarded(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecanet.files.folder_lock.fcntl", None)
    with RunFolder(tmp_path / "out"):
        fit(tiny(epochs=1), tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "last.ckpt").exists()


def test_output_folder_that_is_a_file_is_named(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    leave(tmp_path / "file")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=f"^{re.escape(str(out))} cannot be the output folder"):
            fit(tiny(epochs=1), out, progress=False)


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def removed_and_made_anew(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


@pytest.mark.parametrize("checkpoint_steps", [None, 3], ids=["epochs", "steps"])
@pytest.mark.parametrize("what", [removed, removed_and_made_anew, moved])
@pytest.mark.parametrize("step", [1, 10], ids=["first epoch", "second epoch"])
def test_folder_that_is_gone_in_the_middle_is_named(
    tiny: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: Callable[[Path], None],
    step: int,
    checkpoint_steps: int | None,
) -> None:
    training_step = Classifier.training_step

    def remove_at_step(self: Classifier, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == step:
            what(tmp_path / "out")
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", remove_at_step)
    with pytest.raises(FileNotFoundError, match=r"^the output folder .*out was removed or replaced during the run"):
        fit(tiny(epochs=2, checkpoint_steps=checkpoint_steps), tmp_path / "out", progress=False)
    assert not list(tmp_path.rglob("out/*.ckpt"))


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file grow larger: what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 8000], ids=["before the first step", "at the first checkpoint"])
def test_disk_that_is_full_from_the_start(tiny: Callable[..., Recipe], tmp_path: Path, size: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match=re.escape(str(out))) as caught, files_up_to(size):
        fit(tiny(epochs=1, checkpoint_steps=None), out, progress=False)
    said = str(caught.value)
    assert f"free some space; there is no {out / 'last.ckpt'} to go on from: run the same command again" in said
    assert len(said.splitlines()) == 1
    assert not list(out.glob("*.ckpt"))


def test_full_disk_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = SafeCheckpointIO()
    for name in ("best.ckpt", "last.ckpt"):
        with pytest.raises(OSError, match=r"there is no .*last\.ckpt to go on from: run the same command again"):
            writer.save_checkpoint({}, tmp_path / name)
    leave(tmp_path / "last.ckpt")
    with pytest.raises(OSError, match=r"free some space; .*last\.ckpt holds the state up to its last save: .*--resume"):
        writer.save_checkpoint({}, tmp_path / "best.ckpt")


def test_two_links_are_one_run_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    symlink_to("out")(tmp_path / "link")
    with RunFolder(tmp_path / "out"), pytest.raises(BlockingIOError), RunFolder(tmp_path / "link"):
        pass


def test_lock_is_free_right_after_the_run(tmp_path: Path, holder: Callable[..., FreshProcess]) -> None:
    process = holder()
    process.send_signal(signal.SIGTERM)
    process.wait()
    begun = time.monotonic()
    with RunFolder(tmp_path / "out"):
        assert time.monotonic() - begun < 10
