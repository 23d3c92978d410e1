"""A killed run goes on to the weights of an uninterrupted one, bit for bit."""

import json
import multiprocessing
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

import ecanet
from ecanet.inspect import gates
from ecanet.ops.backend import choose
from ecanet.train import Recipe, TrainerConfig, fit
from ecanet.train.checkpoint import SafeCheckpointIO, load_trained, read_checkpoint
from ecanet.train.classifier import Classifier, learning_rate_factor
from ecanet.train.config import to_plain
from ecanet.train.data.loading import Augmented, EpochSampler, read_splits, train_transform
from ecanet.train.networks import build_network
from tests.fresh import FreshProcess


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The folder of a run that nothing disturbs, trained once for each recipe."""
    folders: dict[str, Path] = {}

    def train(recipe: Recipe) -> Path:
        if repr(recipe) not in folders:
            folders[repr(recipe)] = tmp_path_factory.mktemp("whole")
            fit(recipe, folders[repr(recipe)], progress=False)
        return folders[repr(recipe)]

    return train


def fit_until(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, out: Path, step: int, resume: bool = False) -> None:
    training_step = Classifier.training_step

    def stop_at_step(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == step:
            raise KilledError
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", stop_at_step)
        with pytest.raises(KilledError):
            fit(recipe, out, resume=resume, progress=False)


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run lies that :func:`killed` copies."""
    return tmp_path_factory.mktemp("killed") / "run"


@pytest.fixture
def killed(killed_once: Path, tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of ``tiny()`` that was killed after 12 of its 24 steps: a copy, as it is trained once."""
    if not killed_once.exists():
        fit_until(monkeypatch, tiny(), killed_once, 12)
    return Path(shutil.copytree(killed_once, tmp_path / "killed"))


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
def test_a_run_that_is_killed_and_resumed_again_and_again_ends_with_the_same_bits(
    tiny: Callable[..., Recipe], whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    recipe = tiny(**VARIANTS[variant])
    for step in STEPS.values():
        fit_until(monkeypatch, recipe, tmp_path, step, resume=True)
    fit(recipe, tmp_path, resume=True, progress=False)
    assert_same_end(whole(recipe), tmp_path)


def test_different_seeds_end_with_different_bits(tiny: Callable[..., Recipe], whole) -> None:
    a, b = (read_checkpoint(whole(tiny(seed=seed)) / "last.ckpt")["state_dict"] for seed in (0, 1))
    assert not torch.equal(a["network.fc.weight"], b["network.fc.weight"])


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_killed_between_two_writes(
    tiny: Callable[..., Recipe], whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    recipe = tiny(checkpoint_steps=None)
    want = whole(recipe)
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
    assert_same_end(want, tmp_path / "killed")


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


@pytest.mark.parametrize(
    ("killer", "status"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
    ids=lambda s: getattr(s, "name", ""),
)
def test_killed_process_resumes_to_the_same_bits(
    tiny: Callable[..., Recipe], whole, tmp_path: Path, killer: signal.Signals, status: int
) -> None:
    recipe = tiny(checkpoint_steps=None)
    process = FreshProcess(SCRIPT, json.dumps(to_plain(recipe)), tmp_path / "killed")
    lines = []
    while "epoch\n" not in lines or not (tmp_path / "killed" / "last.ckpt").exists():
        if line := process.stdout.readline():
            lines.append(line)
        else:
            assert process.returncode is None, lines
            time.sleep(0.01)
    process.send_signal(killer)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert read_checkpoint(tmp_path / "killed" / "last.ckpt")["global_step"] < 24
    if killer != signal.SIGKILL:
        assert "go on with the same command and --resume" in "".join(lines) + rest
    fit(recipe, tmp_path / "killed", resume=True, progress=False)
    assert_same_end(whole(recipe), tmp_path / "killed")


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
    recipe = tiny(epochs=1)
    fit(recipe, tmp_path, progress=False)
    for block, key, then, now in (
        ("optim", "lr", 0.1, 0.5),
        ("optim", "mixup", 0.3, 0.0),
        ("data", "augment", "auto", "none"),
        ("data", "batch_size", 8, 4),
        ("trainer", "seed", 0, 1),
        ("trainer", "precision", "32-true", "bf16-mixed"),
    ):
        other = replace(recipe, **{block: replace(getattr(recipe, block), **{key: now})})
        message = f"{block}.{key}: {then!r} then, {now!r} now): use the one that it was started with, or start again"
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(other, tmp_path, resume=True, progress=False)


def test_the_number_of_loading_processes_may_change(tiny: Callable[..., Recipe], whole) -> None:
    recipe = tiny()
    other = replace(recipe, data=replace(recipe.data, workers=2))
    assert_same_end(whole(recipe), whole(other))


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


# --- exactly or not at all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"schedule": "step", "step_epochs": 2}, {"schedule": "exponential", "ema": 0.9}])
@pytest.mark.parametrize("first", ["finished", "killed"])
def test_an_extended_run_ends_as_one_that_was_longer_from_the_start(
    tiny, whole, tmp_path, monkeypatch, first, changes
) -> None:
    shorter = tiny(epochs=2, **changes)
    if first == "finished":
        fit(shorter, tmp_path / "extended", progress=False)
    else:
        fit_until(monkeypatch, shorter, tmp_path / "extended", 12)
    fit(tiny(**changes), tmp_path / "extended", resume=True, progress=False)
    assert_same_end(whole(tiny(**changes)), tmp_path / "extended")
    assert read_checkpoint(tmp_path / "extended" / "last.ckpt")["ecanet"]["recipe"]["optim"]["epochs"] == 3


def test_an_extended_cosine_goes_on_at_the_rate_of_the_longer_one(tiny, tmp_path, monkeypatch) -> None:
    fit(tiny(epochs=2), tmp_path, progress=False)
    rates, training_step = [], Classifier.training_step

    def look(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", look)
    recipe = tiny(epochs=4)
    result = fit(recipe, tmp_path, resume=True, progress=False)
    assert len(result.history) == 4
    wanted = [recipe.optim.rate * learning_rate_factor(recipe.optim, step / 8) for step in range(16, 32)]
    assert rates == wanted
    assert rates[0] > 0


@pytest.mark.parametrize(
    ("epochs", "step", "changes", "message"),
    [
        (4, 12, {}, r"it has done 1 of 3 epochs of a cosine.*finish with optim\.epochs=3; then it can be extended"),
        (2, 12, {}, r"it has done 1 of 3 epochs of a cosine"),
        (1, 20, {"schedule": "constant"}, r"optim\.epochs=1: it has done 2 already"),
    ],
    ids=["a longer cosine", "a shorter cosine", "fewer than are done"],
)
def test_other_epochs_are_refused_where_the_run_would_be_another(
    tiny, tmp_path, monkeypatch, epochs, step, changes, message
) -> None:
    fit_until(monkeypatch, tiny(**changes), tmp_path, step)
    before = (tmp_path / "last.ckpt").read_bytes(), (tmp_path / "recipe.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        fit(tiny(epochs=epochs, **changes), tmp_path, resume=True, progress=False)
    assert before == ((tmp_path / "last.ckpt").read_bytes(), (tmp_path / "recipe.json").read_bytes())


def rewrite(last: Path, change: Callable[[dict[str, Any]], None]) -> None:
    checkpoint = read_checkpoint(last)
    change(checkpoint["ecanet"])
    SafeCheckpointIO().save_checkpoint(checkpoint, last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda about: about["made_by"].update(processes=2),
            r"on 1 process: it was started on 2 processes of 8 images",
        ),
        (
            lambda about: about["made_by"].update(images=61),
            "started with 61 training pictures of 3 classes, and now .* 60",
        ),
        (lambda about: about.update(classes=["bag", "boot", "hat"]), "or the classes have other names"),
        (lambda about: about.pop("made_by"), "does not say on how many processes it was trained"),
        (lambda about: about["made_by"].update(processes="2"), "processes must be a number"),
        (lambda about: about["made_by"].update(versions=[]), "does not say with which versions"),
        (lambda about: about["made_by"].update(versions=[{"torch": "x" * 99}]), "its versions are not valid"),
    ],
    ids=["processes", "images", "classes", "not made by anything", "a text", "no versions", "a long version"],
)
def test_what_cannot_go_on_exactly_is_refused_with_the_reason(tiny, killed, change, message) -> None:
    rewrite(killed / "last.ckpt", change)
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        fit(tiny(), killed, resume=True, progress=False)
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before


def test_devices_and_nodes_may_be_said_otherwise_where_there_are_as_many_processes(
    tiny, whole, killed, tmp_path
) -> None:
    recipe = tiny()
    other = replace(recipe, trainer=replace(recipe.trainer, devices=1))
    fit(other, killed, resume=True, progress=False)
    assert_same_end(whole(recipe), killed)


def test_a_run_that_goes_on_with_another_version_says_so_and_names_both(tiny, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ecanet.__version__", "0.0.9")
        fit_until(monkeypatch, tiny(), tmp_path, 12)
    with pytest.warns(UserWarning, match=r"was trained with ecanet 0\.0\.9, torch .* and goes on with ecanet 0\.1"):
        result = fit(tiny(), tmp_path, resume=True, progress=False)
    stamped = read_checkpoint(tmp_path / "last.ckpt")["ecanet"]["made_by"]["versions"]
    assert [each["ecanet"] for each in stamped] == ["0.0.9", ecanet.__version__]
    assert result.versions == stamped
    again = fit(tiny(), tmp_path, resume=True, progress=False)  # finished: nothing is said, nothing computed
    assert again.versions == stamped


@pytest.mark.parametrize("what", ["kernels", "threads"])
def test_a_run_that_goes_on_with_other_kernels_or_threads_says_so_and_names_both(tiny, tmp_path, what) -> None:
    def stop(record: dict[str, float]) -> None:
        if record["epoch"] == 2:
            raise KilledError

    recipe, threads = tiny(), torch.get_num_threads()
    with ecanet.backend("reference"), pytest.raises(KilledError):
        fit(recipe, tmp_path, progress=False, on_epoch=stop)
    try:
        if what == "threads":
            torch.set_num_threads(threads + 1)
        with ecanet.backend("auto" if what == "kernels" else "reference"):
            if what == "kernels" and choose(torch.empty(0)) == "reference":
                pytest.skip("the kernels are not built")
            with pytest.warns(UserWarning, match=f"{what} (reference|{threads}).* and goes on with .* {what} "):
                fit(recipe, tmp_path, resume=True, progress=False)
    finally:
        torch.set_num_threads(threads)
    first, last = read_checkpoint(tmp_path / "last.ckpt")["ecanet"]["made_by"]["versions"]
    assert [key for key in first if first[key] != last[key]] == [what]


def test_what_a_checkpoint_says_of_versions_is_shown_without_escape_codes(tiny, killed) -> None:
    rewrite(killed / "last.ckpt", lambda about: about["made_by"]["versions"][0].update(torch="\x1b[2J"))
    with pytest.warns(UserWarning, match=r"torch \\x1b\[2J"):
        fit(tiny(), killed, resume=True, progress=False)


def test_loading_processes_give_the_same_batches_however_they_are_started(tiny) -> None:
    recipe = tiny()
    images = read_splits(recipe.data).train
    order = EpochSampler(len(images), 0, 8)
    data = Augmented(images, train_transform(recipe.data), 0)
    want = list(DataLoader(data, 8, sampler=order))
    for method in multiprocessing.get_all_start_methods():
        if method == "spawn":  # pickles as forkserver does, whose processes need not import torch
            continue
        got = list(DataLoader(data, 8, sampler=order, num_workers=1, multiprocessing_context=method))
        for (pictures, labels), (same_pictures, same_labels) in zip(want, got, strict=True):
            assert torch.equal(pictures, same_pictures)
            assert torch.equal(labels, same_labels)


@pytest.mark.parametrize(
    ("of_the_first", "message"),
    [
        ({"step": 0}, "step 12, and the first one 0: all need the same --out, on a file system that they share"),
        (
            {"training images": 61},
            r"training images 60, and the first one 61: all need the same pictures \(data.root\)",
        ),
        ({"validation images": 17}, "validation images 18, and the first one 17: all need the same pictures"),
        ({"classes": ["boot", "bag", "coat"]}, "classes .* and the first one .* all need the same pictures"),
        ({"data.batch_size": 9}, "data.batch_size 8, and the first one 9: all need the same command"),
    ],
    ids=["step", "training images", "validation images", "classes", "recipe"],
)
def test_a_process_that_does_not_do_what_the_first_does_ends(
    tiny, killed, monkeypatch, of_the_first: dict[str, Any], message: str
) -> None:

    def broadcast(self: SingleDeviceStrategy, mine: Any, src: int = 0) -> Any:
        is_compared = isinstance(mine, dict) and mine.keys() & of_the_first.keys()
        return mine | of_the_first if is_compared else mine

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", broadcast)
    with pytest.raises(ValueError, match=f"process 0 has {message}"):
        fit(tiny(), killed, resume=True, progress=False)


@pytest.mark.parametrize(
    "strategy", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_2", "ddp_spawn", "ddp_fork", "nonsense"]
)
def test_strategies_that_could_not_be_resumed_are_refused_with_the_remedy(strategy) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.strategy must be one of auto, ddp, .*'{strategy}'.*; ddp trains"):
        TrainerConfig(strategy=strategy)
