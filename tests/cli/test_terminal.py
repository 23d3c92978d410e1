"""What people look at: a terminal of 80 columns, a log, a pipe, and the answer to a typo."""

import contextlib
import csv
import errno
import fcntl
import logging
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ecanet.cli import VERBS, main
from ecanet.cli.mistakes import explained
from ecanet.train import load_trained
from ecanet.train.classifier import Classifier
from tests import fresh

COLUMNS = 80


class Terminal:
    """A terminal of 80 columns whose screen can be read; while it is open, it is stdout and stderr."""

    def __init__(self) -> None:
        self.drawn = ""

    def __enter__(self) -> "Terminal":
        self._reading, end = os.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        self._stack = contextlib.ExitStack()
        self._stack.callback(os.close, end)
        for name in ("stdout", "stderr"):
            stream = open(end, "w", buffering=1, closefd=False)
            self._stack.callback(stream.close)
            self._stack.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, stream)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._thread.join()
        os.close(self._reading)

    def _read(self) -> None:
        text = b""
        with contextlib.suppress(OSError):  # the other end was closed
            while some := os.read(self._reading, 65536):
                text += some
        self.drawn = text.decode()

    def run(self, words: list[str]) -> int:
        """Run a verb, and end as Python does: an exit message goes to stderr."""
        try:
            main(words)
        except SystemExit as stopped:
            if isinstance(stopped.code, str):
                print(stopped.code, file=sys.stderr)
                return 1
            return int(stopped.code or 0)
        return 0

    def screens(self) -> Iterator[list[str]]:
        """The lines on the screen after each thing that was drawn."""
        lines, column = [""], 0
        for part in re.split(r"(\r|\n|\x1b\[K)", self.drawn.replace("\r\n", "\n")):
            if part == "\r":
                column = 0
            elif part == "\n":
                lines.append("")
                column = 0
            elif part == "\x1b[K":
                lines[-1] = lines[-1][:column]
            else:
                assert "\x1b" not in part, "only what this screen understands"
                lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + len(part) :]
                column += len(part)
            yield [line.rstrip() for line in lines]

    @property
    def screen(self) -> list[str]:
        return list(self.screens())[-1]


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """As in a command that somebody types; what a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def words(image_folder: Path, tmp_path: Path) -> list[str]:
    return [
        *("fit", "--out", str(tmp_path / "out"), "--data.source", "image_folder", "--data.root", str(image_folder)),
        *("--data.image_size", "12", "--data.resize", "12", "--data.batch_size", "8", "--optim.epochs", "2"),
        *("--optim.lr", "0.02", "--model.options", '{"widths": [4]}', "--trainer.accelerator", "cpu"),
    ]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Have something happen in the middle of a training."""
    train = Classifier.training_step

    def patch(step: int, happens: Callable[[], object]) -> None:
        def training_step(self: Classifier, batch: object, batch_idx: int) -> object:
            if self.trainer.global_step == step:
                happens()
            return train(self, batch, batch_idx)

        monkeypatch.setattr(Classifier, "training_step", training_step)

    return patch


EPOCH = r"epoch \d/2: top-1 \d+\.\d\d %, loss [\d.]+ \(train [\d.]+\), took \d\d:\d\d"


def test_a_terminal_of_80_columns_shows_epoch_accuracy_and_time_left_and_keeps_a_line_of_each_epoch(words, at_step):
    at_step(9, lambda: (print("a line"), print("a warning", file=sys.stderr), logger.warning("logged")))
    logger = logging.getLogger("lightning.pytorch")
    with Terminal() as terminal:
        assert terminal.run(words) == 0
    screens = list(terminal.screens())
    bars = [line for screen in screens for line in screen if "|" in line]
    assert COLUMNS - 10 < max(map(len, bars)) < COLUMNS
    assert any(re.match(r"epoch 2/2 +\d+ %\|.*\| top-1 \d+\.\d\d %, left \d\d:\d\d", bar) for bar in bars)
    first, *said, second, result, following, end = terminal.screen
    assert re.fullmatch(EPOCH + r", left \d\d:\d\d", first)
    assert re.fullmatch(EPOCH, second)
    assert said[:2] == ["a line", "a warning"]
    assert (result[:6], following[:6], end) == ("top-1 ", "next: ", "")


def test_an_error_in_the_middle_of_an_epoch_begins_a_line_of_its_own_and_the_bar_is_gone(words, at_step) -> None:
    def fail() -> None:
        raise RuntimeError("the device fell off")

    at_step(9, fail)
    with Terminal() as terminal:
        assert terminal.run(words) == 1
    assert any("epoch 2/2" in screen[-1] for screen in terminal.screens()), "there was a bar when it happened"
    first, *said, end = terminal.screen
    assert re.fullmatch(EPOCH + r", left \d\d:\d\d", first)
    assert said == ["ecanet fit: RuntimeError: the device fell off", "(ECANET_TRACEBACK=1 shows where)"]
    assert end == ""


def test_an_error_clears_what_any_verb_had_begun_to_write_in_its_line(monkeypatch) -> None:
    def fail(*_: object) -> None:
        print("resnet50: turn 3 of 10", end="", file=sys.stderr, flush=True)
        raise ValueError("no memory")

    monkeypatch.setattr("ecanet.cli.gates.describe_gates", fail)
    with Terminal() as terminal:
        assert terminal.run(["gates"]) == 1
    assert terminal.screen == ["ecanet gates: ValueError: no memory", "(ECANET_TRACEBACK=1 shows where)", ""]


def test_ctrl_c_says_how_to_go_on_in_a_line_of_its_own_and_exits_with_130(words, at_step, tmp_path: Path) -> None:
    def press() -> None:
        os.write(sys.stderr.fileno(), b"^C")  # as a terminal does
        signal.raise_signal(signal.SIGINT)

    at_step(9, press)
    with Terminal() as terminal:
        assert terminal.run(words) == 130
    assert all(len(line) <= COLUMNS for screen in terminal.screens() for line in screen if "^C" in line)
    _, *said, end = terminal.screen
    last = tmp_path / "out" / "last.ckpt"
    assert (
        "".join(said)
        == f"Interrupted: {last} holds the state up to its last save: go on with the same command and --resume."
    )
    assert end == ""


def test_ctrl_c_while_validating_exits_with_130_too(words, monkeypatch, tmp_path: Path, capsys) -> None:
    main([*words, "--optim.epochs", "1"])
    monkeypatch.setattr(Classifier, "validation_step", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(tmp_path / "out"), "--accelerator", "cpu"])
    assert stopped.value.code == 130


def test_the_search_for_a_learning_rate_has_a_bar_of_its_own_on_a_terminal_which_ctrl_c_takes_away(words, at_step):
    at_step(9, lambda: signal.raise_signal(signal.SIGINT))
    with Terminal() as terminal:
        assert terminal.run([*words, "--find-lr"]) == 130
    bars = [line for screen in terminal.screens() for line in screen if "|" in line]
    assert any(re.match(r"finding a learning rate +\d+ %\|.*\| left ", bar) for bar in bars)
    assert max(map(len, bars)) <= COLUMNS - 2, "there is room for ^C"
    assert not any(terminal.screen)


def test_the_search_for_a_learning_rate_draws_no_bar_where_there_is_no_terminal(words, monkeypatch, capfd) -> None:
    monkeypatch.setattr("ecanet.train.find_lr._STEPS", 20)
    main([*words, "--find-lr"])
    said, complained = capfd.readouterr()
    assert re.fullmatch(r"wrote .*\nsuggested: .*\n", said)
    assert complained == ""


def test_a_warning_is_a_note_in_one_line_without_a_place_in_the_code(monkeypatch, capsys) -> None:
    def warn(*_: object) -> list[object]:  # pytest collects warnings, so this writes as Python does
        print(warnings.formatwarning(UserWarning("a first\n  and a second line"), UserWarning, "/a/file.py", 12))
        return []

    monkeypatch.setattr("ecanet.cli.gates.describe_gates", warn)
    before = warnings.formatwarning
    main(["gates"])
    assert capsys.readouterr().out.startswith("note: a first and a second line\n")
    assert warnings.formatwarning is before
    monkeypatch.setenv("ECANET_TRACEBACK", "1")
    main(["gates"])
    assert capsys.readouterr().out.startswith("/a/file.py:12: UserWarning: a first")


def test_redirected_output_has_a_line_for_each_epoch_and_no_bar(words, capfd) -> None:
    main(words)
    said, complained = capfd.readouterr()
    assert re.fullmatch(rf"{EPOCH}, left \d\d:\d\d\n{EPOCH}\ntop-1 .*\nnext: .*\n", said)
    assert complained == ""


def test_metrics_csv_has_a_row_for_each_epoch_and_is_continued_by_a_resumed_run(words, at_step, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def rows() -> list[dict[str, float]]:
        with (out / "metrics.csv").open() as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    at_step(9, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        main(words)
    assert [row["epoch"] for row in rows()] == [1]
    at_step(-1, lambda: None)
    (out / "metrics.csv").write_text("lost")
    main([*words, "--resume"])
    assert rows() == load_trained(out / "last.ckpt").history
    assert [row["epoch"] for row in rows()] == [1, 2]
    (out / "metrics.csv").unlink()
    main([*words, "--resume"])  # nothing is left to train
    assert len(rows()) == 2


@pytest.mark.parametrize("words", [["--help"], ["gates"]], ids=" ".join)
def test_a_reader_that_has_seen_enough_closes_the_pipe_quietly(words: list[str]) -> None:
    code = (
        "import os\nreading, writing = os.pipe()\nos.dup2(writing, 1)\nos.close(reading)\nos.close(writing)\n"
        f"from ecanet.cli import main\nmain({words})"
    )
    done = fresh.run(code)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGPIPE, "", "")


def test_a_pipe_that_is_not_stdout_and_breaks_is_an_error(monkeypatch) -> None:
    def fail(*_: object) -> str:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("ecanet.cli.gates.listing", fail)
    with Terminal(), pytest.raises(SystemExit, match=r"ecanet gates: BrokenPipeError: .* Broken pipe"):
        main(["gates"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error_with_its_reason() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "ecanet.cli", "--help"], stdout=full, stderr=-1, text=True)
    assert done.returncode != 0
    assert done.stderr == "ecanet: OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fti"], "ecanet: unknown verb 'fti': did you mean 'fit'?"),
        (["--versoin"], "ecanet: unknown option '--versoin': did you mean '--version'?"),
        (
            ["fit", "--optim.epoch", "3"],
            "ecanet fit: unrecognized arguments: --optim.epoch 3: did you mean '--optim.epochs'?",
        ),
        (["fit", "--data.augmnet=none"], "did you mean '--data.augment'?"),
        (["fit", "-out", "x"], "did you mean '--out'?"),
        (["validate", "x", "--acelerator", "cpu"], "did you mean '--accelerator'?"),
        (["insert", "--modle", "torchvision/resnet18"], "required: --model; --modle: did you mean '--model'?"),
        (["build", "--if-posible"], "did you mean '--if-possible'?"),
        (["fit", "--data.source", "imagefolder"], "--data.source must be one of embedded, "),
        (["fit", "--data.source", "imagefolder"], "got 'imagefolder': did you mean 'image_folder'?"),
        (["fit", "--trainer.devices", "atuo"], "got 'atuo': did you mean 'auto'?"),
        (["fit", "--trainer.accelerator", "gpus"], "got 'gpus': did you mean 'gpu'?"),
        (["fit", "--trainer.loggers", "csv,wandv"], "got 'wandv': did you mean 'wandb'?"),
        (["fit", "--model.gate", "ecaa"], "did you mean 'eca'?"),
        (["fit", "--optim.epochs", "many"], "ecanet fit: --optim.epochs must be an integer, got 'many'\n"),
        (["fit", "--optim.epochs="], "ecanet fit: --optim.epochs must be an integer, got ''\n"),
        (["fit", "--data.image_size="], "ecanet fit: --data.image_size must be an integer or null, got ''\n"),
        (["fit", "--optim.nesterov=ture"], "--optim.nesterov must be true or false, got 'ture'"),
        (["fit", "--data.image_size", "big"], "--data.image_size must be an integer or null, got 'big'\n"),
        (["gates", "simma"], "did you mean 'simam'?"),
        (["xyzzy"], f"ecanet: unknown verb 'xyzzy': one of {', '.join(VERBS)}\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typo_is_answered_in_one_line_with_what_was_meant(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capsys.readouterr().err if isinstance(stopped.value.code, int) else f"{stopped.value.code}\n"
    assert said in printed
    _, *hint, end = printed.split("\n")
    assert all(line[0] == "(" and line[-1] == ")" for line in hint)
    assert (len(hint) <= 1, end) == (True, "")


def test_pictures_that_cannot_be_read_are_listed_line_by_line(image_folder: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(image_folder, root)
    (root / "train" / "bag" / "empty.png").write_bytes(b"")
    (root / "train" / "bag" / "gone.png").symlink_to("nowhere")
    words = ["--data.source", "image_folder", "--data.root", str(root), "--trainer.accelerator", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *words, "--out", str(tmp_path / "out")])
    first, *listed, hint = str(stopped.value.code).splitlines()
    assert first.endswith("images cannot be read, remove or replace them:")
    assert listed == [
        f"  '{root}/train/bag/empty.png': it is empty;",
        f"  '{root}/train/bag/gone.png': No such file or directory",
    ]
    assert hint.startswith("(ECANET_TRACEBACK")


def test_a_message_of_another_form_only_loses_its_line_breaks() -> None:
    assert explained("first\n  second", ["--out"], ["--uot"]) == "first second"
    assert explained("a must be one of x, got y: did you mean 'z'?") == "a must be one of x, got y: did you mean 'z'?"
