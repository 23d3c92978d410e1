"""Suggests a learning rate with Lightning's finder: the loss against a rate that grows with every step."""

import contextlib
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.tuner import lr_finder
from lightning.pytorch.tuner.tuning import Tuner
from tqdm import tqdm

from ecanet.inspect.style import DARK, OTHERS, SMALL_FONT_SIZE, new_figure, style_axes
from ecanet.train.config import Recipe
from ecanet.train.data.loading import ImageData
from ecanet.train.fit import build_classifier
from ecanet.train.networks import without_insertion_file
from ecanet.train.progress import columns
from ecanet.train.quiet import quiet_lightning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Lowest and highest rate, and the number of steps between them.
_LOWEST, _HIGHEST, _STEPS = 1e-6, 10.0, 100
#: Decay of Lightning's moving average of the loss, and the first step whose rate can be suggested.
_BETA, _FIRST = 0.98, 10


@dataclass(frozen=True)
class RateSearch:
    """How the training loss changed while the learning rate grew.

    Attributes:
        suggestion: The rate at which the loss fell most steeply against the rate's logarithm.
        rates: The rate of each step.
        losses: The smoothed training loss after each step.
    """

    suggestion: float
    rates: list[float]
    losses: list[float]

    def plot(self) -> "Figure":
        """Draw loss against rate, with the suggestion.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure = new_figure(3.6)
        axes = figure.add_subplot()
        axes.plot(self.rates, self.losses, color=OTHERS[0], linewidth=1.6)
        axes.set_xscale("log")
        style_axes(axes, "learning rate (logarithmic)", "training loss, smoothed")
        axes.axvline(self.suggestion, color=DARK, linewidth=1, linestyle="--")
        axes.annotate(
            f"suggested: {self.suggestion:.2g}",
            (self.suggestion, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=SMALL_FONT_SIZE,
            color=DARK,
        )
        return figure


def find_learning_rate(recipe: Recipe) -> RateSearch:
    """Train a network for at most 100 steps while the learning rate grows from 1e-6 to 10, and discard the network.

    The search (Smith, 2017, arXiv:1506.01186) stops when the loss is 4 times its lowest. All parameters have the same
    rate: ``optim.gate_lr_scale`` is ignored. There is no warm-up, no average of weights and no compilation. Nothing is
    written.

    Args:
        recipe: The training run that needs a learning rate; the search uses one process.

    Raises:
        ValueError: the recipe is wrong, or the loss diverges too early for a suggestion.

    Example:
        >>> find_learning_rate(Recipe()).suggestion  # doctest: +SKIP
        0.068
    """
    recipe = replace(recipe, trainer=replace(recipe.trainer, compile=False))
    with quiet_lightning(), _own_bar(), tempfile.TemporaryDirectory() as folder:
        # The folder is for the checkpoint that Lightning's finder writes and reads back.
        L.seed_everything(recipe.trainer.seed, workers=True, verbose=False)
        data = ImageData(recipe.data, recipe.trainer.seed)
        classifier = build_classifier(recipe, without_insertion_file(recipe.model), data, processes=1)
        # If an epoch has fewer batches than a step, a step takes all of them; else the finder would see no step.
        accumulate = min(recipe.optim.accumulate, data.batches_per_epoch(1))
        trainer = L.Trainer(
            accelerator=recipe.trainer.accelerator,
            devices=1,
            precision=recipe.trainer.precision,  # type: ignore[arg-type]
            max_epochs=_STEPS,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=recipe.optim.clip_norm,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        data.trainer = trainer
        finder: Any = Tuner(trainer).lr_find(
            classifier,
            train_dataloaders=data.train_dataloader(),
            min_lr=_LOWEST,
            max_lr=_HIGHEST,
            num_training=_STEPS,
            update_attr=False,
        )
    rates, losses = finder.results["lr"], _smoothed([loss * accumulate for loss in finder.results["loss"]])
    middle = torch.tensor(losses[_FIRST:-1])
    if len(middle) < 2 or not middle.isfinite().all():
        raise ValueError(
            f"no learning rate can be suggested: the loss diverged after {len(losses)} of {_STEPS} steps. Set optim.lr "
            "by hand"
        )
    # The slope against the logarithm of the rate. Lightning's own suggestion uses the slope against the rate itself,
    # which depends on the noise at the lowest rates.
    return RateSearch(rates[_FIRST + int(torch.gradient(middle)[0].argmin())], rates, losses)


@contextlib.contextmanager
def _own_bar() -> Iterator[None]:
    """Replace Lightning's bar, which is always drawn, by one only on a terminal, which is removed at the end."""

    def begin(desc: str, total: int) -> tqdm:
        layout = "finding a learning rate {percentage:3.0f} %|{bar}| left {remaining}"
        width = columns() if sys.stderr.isatty() else None
        return bars.enter_context(tqdm(total=total, bar_format=layout, leave=False, disable=None, ncols=width))

    handler = signal.getsignal(signal.SIGINT)
    with contextlib.ExitStack() as bars, patch.object(lr_finder, "tqdm", begin):
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)  # after Ctrl-C Lightning leaves it ignored


def _smoothed(losses: list[float]) -> list[float]:
    """Correct Lightning's moving average in its first steps: its bias correction is that of one step more."""
    return [loss * (1 - _BETA ** (i + 2)) / (1 - _BETA ** (i + 1)) for i, loss in enumerate(losses)]
