"""Decides whether a run can go on from its last checkpoint: exactly, or not at all."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

import ecanet
from ecanet.ops.backend import choose
from ecanet.train.checkpoint import ABOUT_KEY, SaveCheckpoints, check_about, read_checkpoint
from ecanet.train.classifier import Classifier
from ecanet.train.config import OPTIMISERS, OptimConfig, Recipe, to_plain, with_defaults
from ecanet.train.data.loading import ImageData
from ecanet.untrusted import check_number, listed, shown

#: Keys that may change when a run is resumed, as they do not affect the result. The total number of processes is
#: checked separately.
_WITHOUT_EFFECT = {"data.root", "data.val_root", "data.download", "data.verify", "data.workers", "trainer.log_steps"}
_WITHOUT_EFFECT |= {"trainer.loggers", "trainer.checkpoint_steps", "model.weights", "trainer.devices", "trainer.nodes"}
#: Numbers that affect the result and are not in the recipe.
_COUNTS = ("processes", "batch_size", "images")


@dataclass(frozen=True)
class Resumed:
    """The last checkpoint of a run that goes on.

    Attributes:
        path: The file.
        recipe: The recipe that the run was started with, as plain values.
        classes: Its classes.
        made_by: What else its result depends on: ``processes``, ``batch_size``, ``images`` and ``versions``.
        is_finished: Whether it has done all epochs of that recipe, or stopped early.
        is_extended: Whether it now has to do more epochs than that recipe has.
    """

    path: Path
    recipe: dict[str, Any]
    classes: list[str]
    made_by: dict[str, Any]
    is_finished: bool
    is_extended: bool


def last_state(recipe: Recipe, last: Path, resume: bool) -> Resumed | None:
    """Read the checkpoint from which a run goes on; None for a new run.

    Args:
        recipe: The run's recipe.
        last: Path of its last checkpoint.
        resume: Whether it may go on.

    Raises:
        FileExistsError: there is a checkpoint, and ``resume`` is False.
        FileNotFoundError: the checkpoint is a link to a file that does not exist.
        ValueError: the checkpoint is damaged, or belongs to a run of another recipe.
    """
    if not os.path.lexists(last):
        return None
    if not resume:
        raise FileExistsError(
            f"{last.parent} already holds a training run: add --resume to go on with it, or choose another --out"
        )
    if not last.exists():
        raise FileNotFoundError(
            f"{last} is a link to {shown(os.readlink(last), 200)}, which does not exist: restore that, or choose "
            "another --out"
        )
    checkpoint = read_checkpoint(last)
    check_resumable(checkpoint, last)
    about = checkpoint[ABOUT_KEY]
    before, now = what_decides(with_defaults(about["recipe"])), what_decides(to_plain(recipe))
    epochs = before.pop("optim.epochs")
    del now["optim.epochs"]
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if changed:
        what = ", ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed)
        raise ValueError(
            f"cannot resume {last.parent} with another recipe ({shown(what, 1000)}): use the one that it was started "
            "with, or start again in another --out"
        )
    done, stopped = len(about["history"]), stops_early(recipe.optim, about["history"])
    _check_epochs(last.parent, done, epochs, recipe.optim, stopped)
    extended = recipe.optim.epochs > epochs
    made_before = {key: about["made_by"][key] for key in (*_COUNTS, "versions")}
    return Resumed(last, about["recipe"], about["classes"], made_before, done >= epochs or stopped, extended)


def stops_early(optim: OptimConfig, history: Sequence[Mapping[str, float]]) -> bool:
    """Whether a run ends because for ``optim.early_stopping`` epochs its accuracy has not exceeded its best.

    Example:
        >>> history = [{"val/top1": value} for value in (50, 60, 60, 55)]
        >>> [stops_early(OptimConfig(early_stopping=epochs), history) for epochs in (1, 2, 3)]
        [True, True, False]
    """
    accuracies = [record["val/mAP" if "val/mAP" in record else "val/top1"] for record in history]
    if optim.early_stopping is None or not accuracies:
        return False
    return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= optim.early_stopping


def _check_epochs(folder: Path, done: int, before: int, optim: OptimConfig, stopped: bool) -> None:
    """Raise ValueError if a run cannot go on with the number of epochs that its recipe has now."""
    now = optim.epochs
    if now == before:
        return
    if now < done:
        raise ValueError(f"cannot resume {folder} with optim.epochs={now}: it has done {done} already")
    if stopped:
        raise ValueError(
            f"cannot resume {folder} with optim.epochs={now}: it stopped early, after {done} of {before} epochs. Start "
            "again in another --out, with a larger optim.early_stopping"
        )
    if optim.schedule == "cosine":
        what = "a cosine"
    elif replace(optim, epochs=before).warmup != optim.warmup:
        what = "a schedule whose warm-up depends on them"
    else:
        return
    if done < before:
        raise ValueError(
            f"cannot resume {folder} with optim.epochs={now}: it has done {done} of {before} epochs of {what}, and "
            f"its learning rates would change. Let it finish with optim.epochs={before}; then it can be extended"
        )


def check_same_training(checkpoint: dict[str, Any], classifier: Classifier) -> None:
    """Check the state of a checkpoint's optimiser, and replace its settings by those of the recipe.

    A checkpoint also holds rates, decays and flags of the optimiser and its schedule, which would override the
    recipe's. They are computed again from the recipe and the number of steps.

    Args:
        checkpoint: The checkpoint, which is changed in place.
        classifier: The module that goes on from it.

    Raises:
        ValueError: the state belongs to another optimiser or to other parameters, or its values cannot be right.
    """
    configured: Any = classifier.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    groups, steps = optimizer.state_dict()["param_groups"], checkpoint["global_step"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    (stored,) = checkpoint["optimizer_states"]
    if [group["params"] for group in stored["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("its optimizer has other groups of parameters")
    for index, state in stored["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"its optimizer has a parameter {shown(index)}, and there are {len(parameters)}")
        if (problem := _problem_with_state(state, parameters[index], classifier.optim, steps)) is not None:
            raise ValueError(f"its optimizer's state of parameter {index} {problem}")
    rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    stored["param_groups"] = [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)]
    position = {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates}
    checkpoint["lr_schedulers"] = [{**schedule.state_dict(), **position}]


def _problem_with_state(state: dict[Any, Any], parameter: Tensor, optim: OptimConfig, steps: int) -> str | None:
    known = {"step", "exp_avg", "exp_avg_sq"} if optim.name == "adamw" else {"momentum_buffer"}
    if state.keys() != (known if optim.name == "adamw" or optim.momentum else set()):
        return f"is not that of {optim.name}: it has {listed(map(str, state), 5) or 'nothing'}"
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return f"has no floating-point tensor {name}"
        if value.shape != (torch.Size() if name == "step" else parameter.shape):
            return f"has a {name} of shape {tuple(value.shape)}, and the parameter has {tuple(parameter.shape)}"
        if not value.isfinite().all() or (name != "momentum_buffer" and name != "exp_avg" and value.min() < 0):
            return f"has a {name} with values that are not finite, or negative where they cannot be"
        if name == "step" and not 1 <= float(value) <= steps:
            return f"counts {float(value):g} steps, and the run has done {steps}"
    return None


def made_by(trainer: L.Trainer, data: ImageData, resumed: Resumed | None) -> dict[str, Any]:
    """Collect what the result of a run depends on besides its recipe.

    Args:
        trainer: The run's trainer.
        data: Its pictures.
        resumed: The checkpoint that it goes on from.

    Returns:
        ``processes``; ``batch_size`` of each process; ``images``, the number of training images; ``versions``, the
        present ones last, with the kind of device, the kernels, and the number of threads of a CPU.

    Raises:
        ValueError: the run would go on with another number of processes, or with other pictures.
        RuntimeError: the kernels that ``ECANET_BACKEND`` names cannot run.

    Warns:
        UserWarning: the run goes on with other versions, kernels or threads.
    """
    images = data.training_images
    now = {"processes": trainer.world_size, "batch_size": data.config.batch_size, "images": images}
    device = trainer.strategy.root_device
    versions = {
        "ecanet": ecanet.__version__,
        "torch": str(torch.__version__),
        "device": device.type,
        "kernels": choose(torch.empty(0, device=device)),
    }
    if device.type == "cpu":  # the order in which numbers are added depends on the threads
        versions["threads"] = str(torch.get_num_threads())
    if resumed is None:
        return {**now, "versions": [versions]}
    folder, before = resumed.path.parent, resumed.made_by
    if resumed.is_finished and not resumed.is_extended:  # nothing is left to compute
        return before
    processes, size = before["processes"], before["batch_size"]
    if trainer.world_size != processes:
        raise ValueError(
            f"cannot resume {folder} on {_count(trainer.world_size, 'process')}: it was started on "
            f"{_count(processes, 'process')} of {_count(size, 'image')} per step, and batches, their statistics and "
            f"learning rates would change. Go on with {processes} (--trainer.devices times --trainer.nodes), or "
            "start again in another --out"
        )
    if images != before["images"] or list(data.classes) != resumed.classes:
        raise ValueError(
            f"cannot resume {folder} with other pictures: it was started with {before['images']:,} training pictures "
            f"of {_count(len(resumed.classes), 'class')}, and now there are {images:,} of "
            f"{_count(len(data.classes), 'class')}, or the classes have other names. Start again in another --out"
        )
    if versions == before["versions"][-1]:
        return before
    if getattr(rank_zero_only, "rank", 0) == 0:
        starts = before["versions"][-1], versions
        was, is_now = (", ".join(f"{shown(k)} {shown(v)}" for k, v in start.items()) for start in starts)
        warnings.warn(
            f"{folder} was trained with {was} and goes on with {is_now}: the result is equivalent, but not "
            "bit-identical. Its checkpoints list both",
            stacklevel=2,
        )
    return {**now, "versions": [*before["versions"], versions]}


def _count(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def what_decides(recipe: dict[str, Any]) -> dict[str, Any]:
    """The values that the result depends on, by ``block.key``, from a recipe as plain values."""
    flat = {f"{block}.{key}": value for block, values in recipe.items() for key, value in values.items()}
    for key, default in OPTIMISERS.get(flat["optim.name"], {}).items():
        flat[f"optim.{key}"] = default if flat[f"optim.{key}"] is None else flat[f"optim.{key}"]
    return {key: value for key, value in flat.items() if key not in _WITHOUT_EFFECT}


def check_resumable(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Check the parts of a checkpoint that a resumed run uses.

    Raises:
        ValueError: a part is missing or wrong; the message names the file.
    """
    check_about(checkpoint[ABOUT_KEY], path)
    try:
        problem = _problem_with_checkpoint(checkpoint)
    except (TypeError, ValueError) as error:
        problem = str(error)
    if problem is not None:
        raise ValueError(f"{path} cannot be resumed, {problem}: start again in another --out")


def _problem_with_checkpoint(checkpoint: dict[str, Any]) -> str | None:
    recipe, weights = checkpoint[ABOUT_KEY]["recipe"], checkpoint.get("state_dict")
    if not all(isinstance(recipe.get(block), dict) for block in ("model", "data", "optim", "trainer")):
        return "its recipe lacks a block"
    check_number(recipe["optim"].get("epochs"), "its optim.epochs", 1, 1e6)
    if recipe["optim"].get("name", "sgd") not in tuple(OPTIMISERS):
        return f"its optim.name is {shown(recipe['optim']['name'])}"
    problem = _problem_with_made_by(checkpoint[ABOUT_KEY].get("made_by"))
    if problem is not None:
        return problem
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        return "it holds no weights"
    if not all(type(checkpoint.get(key)) is int and checkpoint[key] >= 0 for key in ("epoch", "global_step")):
        return "it does not say how far it got"
    loops, callbacks = checkpoint.get("loops"), checkpoint.get("callbacks")
    if not isinstance(loops, dict) or not all(isinstance(loop, dict) for loop in loops.values()):
        return "its loops are not valid"
    if not isinstance(callbacks, dict) or not all(isinstance(state, dict) for state in callbacks.values()):
        return "its callbacks are not valid"
    best = callbacks.get(SaveCheckpoints.__qualname__, {"best": 0.0}).get("best")
    if isinstance(best, bool) or not isinstance(best, (int, float)) or not math.isfinite(best):
        return f"its best accuracy is {shown(best)}"
    for record in checkpoint[ABOUT_KEY]["history"]:
        metric = "val/mAP" if checkpoint[ABOUT_KEY].get("multi_label") else "val/top1"
        check_number(record.get(metric), f"{metric} in its history", 0, 100)
    return _problem_with_optimizers(checkpoint.get("optimizer_states"))


def _problem_with_optimizers(states: object) -> str | None:
    """What is wrong with the structure of optimiser states; :func:`check_same_training` checks their values."""
    if not isinstance(states, list) or len(states) != 1:
        return "it does not hold the state of one optimizer"
    state, groups = (states[0].get(key) if isinstance(states[0], dict) else None for key in ("state", "param_groups"))
    if not isinstance(state, dict) or not all(isinstance(values, dict) for values in state.values()):
        return "its optimizer has no state"
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        return "its optimizer has no groups of parameters"
    return None


def _problem_with_made_by(made_by: object) -> str | None:
    if not isinstance(made_by, dict):
        return "it does not say on how many processes it was trained"
    for key in _COUNTS:
        check_number(made_by.get(key), key, 1, 1e12)
    versions = made_by.get("versions")
    if not isinstance(versions, list) or not 1 <= len(versions) <= 1000:
        return "it does not say with which versions it was trained"
    for each in versions:
        texts = [*each, *each.values()] if isinstance(each, dict) else [None]
        if len(texts) > 20 or not all(isinstance(text, str) and len(text) <= 80 for text in texts):
            return "its versions are not valid"
    return None
