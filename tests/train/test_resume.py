"""A killed run goes on to the weights of an uninterrupted one, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ecanet.inspect import gates
from ecanet.train import Recipe, fit
from ecanet.train.checkpoint import SafeCheckpointIO, build_network, load_trained, read_checkpoint
from ecanet.train.classifier import Classifier
from ecanet.train.config import to_plain


class KilledError(Exception):
    pass


def fit_until(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, out: Path, step: int) -> None:
    training_step = Classifier.training_step

    def stop_at_step(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == step:
            raise KilledError
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", stop_at_step)
        with pytest.raises(KilledError):
            fit(recipe, out, progress=False)


def assert_same_end(a: Path, b: Path) -> None:
    best = [read_checkpoint(folder / "best.ckpt")["state_dict"] for folder in (a, b)]
    assert all(torch.equal(value, best[1][name]) for name, value in best[0].items())
    first, second = read_checkpoint(a / "last.ckpt"), read_checkpoint(b / "last.ckpt")
    assert first["global_step"] == second["global_step"] == 24
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    momenta = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)]
    for index, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][index]["momentum_buffer"]), index
    validated = [
        [{k: v for k, v in record.items() if k.startswith("val/")} for record in checkpoint["ecanet"]["history"]]
        for checkpoint in (first, second)
    ]
    assert len(validated[0]) == 3
    assert validated[0] == validated[1]


VARIANTS = {
    "plain": {},
    "moving average": {"ema": 0.9},
    "loading processes": {"workers": 2},
    "bfloat16 autocast": {"precision": "bf16-mixed"},
    "clipped, smoothed": {"clip_norm": 0.5, "label_smoothing": 0.1},
}
STEPS = {"before the first checkpoint": 2, "in the first epoch": 5, "between epochs": 8, "later": 20}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_ends_with_the_same_bits(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    recipe = tiny(**VARIANTS[variant])
    fit(recipe, tmp_path / "whole", progress=False)
    for name, step in STEPS.items():
        out = tmp_path / name
        fit_until(monkeypatch, recipe, out, step)
        fit(recipe, out, resume=True, progress=False)
        assert_same_end(tmp_path / "whole", out)


def test_different_seeds_end_with_different_bits(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    for seed in (0, 1):
        fit(tiny(seed=seed), tmp_path / str(seed), progress=False)
    a, b = (read_checkpoint(tmp_path / str(seed) / "last.ckpt")["state_dict"] for seed in (0, 1))
    assert not torch.equal(a["network.fc.weight"], b["network.fc.weight"])


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_killed_between_two_writes(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    recipe = tiny(checkpoint_steps=None)
    fit(recipe, tmp_path / "whole", progress=False)
    save, writes = SafeCheckpointIO.save_checkpoint, []

    def die_after(self: SafeCheckpointIO, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(self, checkpoint, path, storage_options)
        writes.append(path)
        if len(writes) == write:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(SafeCheckpointIO, "save_checkpoint", die_after)
        with pytest.raises(KilledError):
            fit(recipe, tmp_path / "killed", progress=False)
    fit(recipe, tmp_path / "killed", resume=True, progress=False)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


SCRIPT = """
import json, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
from ecanet.train import *
plain = json.loads(sys.argv[1])
plain["data"]["root"] = Path(plain["data"]["root"])
blocks = zip((ModelConfig, DataConfig, OptimConfig, TrainerConfig), plain.values(), strict=True)
fit(Recipe(*(kind(**block) for kind, block in blocks)), sys.argv[2], progress=False,
    on_epoch=lambda record: (print("epoch", flush=True), time.sleep(0.5)))
"""


@pytest.mark.parametrize("killer", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_killed_process_resumes_to_the_same_bits(
    tiny: Callable[..., Recipe], tmp_path: Path, killer: signal.Signals
) -> None:
    recipe = tiny(checkpoint_steps=None)
    fit(recipe, tmp_path / "whole", progress=False)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(to_plain(recipe)), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    lines = []
    while "epoch\n" not in lines or not (tmp_path / "killed" / "last.ckpt").exists():
        if line := process.stdout.readline():
            lines.append(line)
        else:
            assert process.poll() is None, lines
            time.sleep(0.01)
    process.send_signal(killer)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert read_checkpoint(tmp_path / "killed" / "last.ckpt")["global_step"] < 24
    if killer != signal.SIGKILL:
        assert "go on with the same command and --resume" in "".join(lines) + rest
    fit(recipe, tmp_path / "killed", resume=True, progress=False)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_finished_run_is_not_repeated(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    first = fit(tiny(), tmp_path, progress=False)
    again = fit(tiny(), tmp_path, resume=True, progress=False)
    assert again.history == first.history
    assert again.top1 == first.top1


def test_a_run_is_not_overwritten_without_resume(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    fit(tiny(epochs=1), tmp_path, progress=False)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        fit(tiny(epochs=1), tmp_path, progress=False)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_another_recipe_is_not_resumed(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    fit(tiny(epochs=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.1 then, 0\.5 now"):
        fit(tiny(epochs=1, lr=0.5), tmp_path, resume=True, progress=False)


def test_the_number_of_loading_processes_may_change(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny()
    fit(recipe, tmp_path / "whole", progress=False)
    other = replace(recipe, data=replace(recipe.data, workers=1))
    fit(other, tmp_path / "other", progress=False)
    assert_same_end(tmp_path / "whole", tmp_path / "other")


def test_logs_of_an_interrupted_run_are_kept(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_until(monkeypatch, tiny(), tmp_path, 20)
    fit(tiny(), tmp_path, resume=True, progress=False)
    logs = [(tmp_path / "logs" / f"session_{i}" / "metrics.csv").read_text() for i in (0, 1)]
    assert all("val/top1" in log for log in logs)


def test_a_run_from_plain_weights_goes_on_and_loads_without_their_file(tiny, monkeypatch, tmp_path) -> None:
    recipe = tiny()
    plain = build_network(replace(recipe.model, gate=None), 3)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    recipe = replace(recipe, model=replace(recipe.model, weights=str(tmp_path / "plain.pth")))
    fit(recipe, tmp_path / "whole", progress=False)
    fit_until(monkeypatch, recipe, tmp_path / "killed", 12)
    (tmp_path / "plain.pth").unlink()
    without = replace(recipe, model=replace(recipe.model, weights=None))
    fit(without, tmp_path / "killed", resume=True, progress=False)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    for folder in ("whole", "killed"):
        trained = load_trained(tmp_path / folder)
        assert {gate.factor for gate in gates(trained.network).values()} == {2.0}
        assert trained.recipe["model"]["weights"] == str(tmp_path / "plain.pth")
