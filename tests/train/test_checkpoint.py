"""Checkpoints are written whole or not at all, and read without unpickling code."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ecanet.cli import main
from ecanet.train import Recipe, fit, load_trained
from ecanet.train.checkpoint import SafeCheckpointIO, read_checkpoint
from tests import fresh

SAVE_ON_A_FULL_DISK = """
import resource, signal, sys, torch
from ecanet.train.checkpoint import SafeCheckpointIO
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    SafeCheckpointIO().save_checkpoint({"ecanet": {}, "weights": torch.zeros(100_000)}, sys.argv[1])
except OSError as error:
    print(error)
"""


def test_full_disk_names_the_file_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"ecanet": {}, "weights": torch.ones(3)}, path)
    done = fresh.run(SAVE_ON_A_FULL_DISK, path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert str(path) in said
    assert "File too large" in said
    assert "--resume" in said
    assert torch.equal(read_checkpoint(path)["weights"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


FIT_ON_A_FULL_DISK = """
import resource, signal, sys
from ecanet.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
main(sys.argv[1:])
"""


def test_training_on_a_full_disk_stops_with_the_reason_and_keeps_the_old_checkpoints(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny(epochs=1, mixing=0.0, checkpoint_steps=None)
    root = str(recipe.data.root)
    command = ["fit", "--out", str(tmp_path / "out"), "--data.source", "image_folder", "--data.root", root]
    command += ["--data.image_size", "12", "--data.resize", "12", "--model.options", '{"widths": [8, 16]}']
    command += ["--trainer.accelerator", "cpu", "--optim.epochs", "2", "--optim.schedule", "constant"]
    main([*command, "--optim.epochs", "2"])
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.ckpt")}
    assert len(before) == 2
    done = fresh.run(FIT_ON_A_FULL_DISK, *command[:2], tmp_path / "full", *command[3:])
    assert done.returncode == 1
    assert str(tmp_path / "full" / "best.ckpt") in done.stderr
    assert "free some space" in done.stderr
    assert not list((tmp_path / "full").glob("*.ckpt"))
    assert not list((tmp_path / "full").glob(".*.partial"))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"last\.ckpt"):
        SafeCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")


def test_missing_damaged_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.ckpt"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    damaged = tmp_path / "damaged.ckpt"
    torch.save({"ecanet": {}, "weights": torch.zeros(1000)}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"damaged\.ckpt .*damaged"):
        read_checkpoint(damaged)
    text = tmp_path / "text.ckpt"
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt"):
        read_checkpoint(text)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(ValueError, match=r"foreign\.ckpt .*load_official"):
        read_checkpoint(foreign)


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ecanet": Malicious()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_trained_network_comes_back(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    result = fit(tiny(gate="se", mixing=0.0), tmp_path, progress=False)
    trained = load_trained(tmp_path)
    assert trained.classes == ["bag", "boot", "coat"]
    assert not trained.network.training
    assert max(record["val/top1"] for record in trained.history) == result.best_top1
    weights = read_checkpoint(tmp_path / "best.ckpt")["state_dict"]
    assert torch.equal(trained.network.state_dict()["fc.weight"], weights["network.fc.weight"])


def test_best_is_the_best_epoch(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    result = fit(tiny(epochs=4), tmp_path, progress=False)
    history = read_checkpoint(tmp_path / "best.ckpt")["ecanet"]["history"]
    assert history[-1]["val/top1"] == result.best_top1
    assert len(read_checkpoint(tmp_path / "last.ckpt")["ecanet"]["history"]) == 4


def test_moving_average_is_what_is_saved(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    fit(tiny(ema=0.5), tmp_path, progress=False)
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert not torch.equal(averaged["network.fc.weight"], current["network.fc.weight"])
    trained = load_trained(tmp_path / "last.ckpt")
    assert torch.equal(trained.network.state_dict()["fc.weight"], averaged["network.fc.weight"])
