"""The record of a run: collected after each epoch, written into checkpoints, and used to resume and to stop early."""

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ecanet.train.checkpoint import ABOUT_KEY
from ecanet.train.classifier import Classifier
from ecanet.train.config import Recipe, to_plain
from ecanet.train.data.loading import ImageData
from ecanet.train.resume import Resumed, check_same_training, stops_early, what_decides
from ecanet.train.run_folder import RunFolder
from ecanet.untrusted import shown


class History(Callback):
    """Collects a record of each epoch; writes the records, and what rebuilds the network, into every checkpoint.

    Args:
        recipe: The run's recipe.
        folder: The run's folder, for ``metrics.csv``.
        resumed: The checkpoint that it goes on from.
        on_epoch: Called with every epoch's record.

    Attributes:
        data: The run's pictures; set before the run starts.
        made_by: What else its result depends on (see :func:`ecanet.train.resume.made_by`); set before the run starts.
        records: One record for each epoch.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder | None,
        resumed: Resumed | None,
        on_epoch: Callable[[dict[str, float]], None] | None,
    ) -> None:
        self.recipe, self.folder, self.resumed, self.on_epoch = recipe, folder, resumed, on_epoch
        self.data: ImageData
        self.made_by: dict[str, Any]
        self.records: list[dict[str, float]] = []
        self._steps = 0
        self._start = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that all processes have the same data and recipe; otherwise they would hang or mix up the classes."""
        images = {"training images": self.data.training_images, "validation images": self.data.validation_images}
        _check_same(trainer, {**images, "classes": list(self.data.classes)}, "pictures (data.root)")
        _check_same(trainer, what_decides(to_plain(self.recipe)), "command")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that all processes start at the step at which the checkpoint was written.

        Raises:
            ValueError: they start at different steps, or at another step.
        """
        _check_same(trainer, {"step": trainer.global_step}, "--out, on a file system that they share")
        if trainer.global_step != self._steps:
            raise self._not_resumed(f"it says that it has done {self._steps} steps, and {trainer.global_step}")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the epoch's record."""
        if trainer.state.fn != "fit":
            return
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        self.records.append({"epoch": trainer.current_epoch + 1, **metrics})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the record, and end the run if ``optim.early_stopping`` says so."""
        record = self.records[-1]
        record["train/loss"] = float(trainer.callback_metrics["train/loss_epoch"])
        record["seconds"] = time.perf_counter() - self._start
        trainer.should_stop |= stops_early(self.recipe.optim, self.records)
        self._write_metrics(trainer)
        if self.on_epoch:
            self.on_epoch(record)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the description and the history of the run to a checkpoint."""
        checkpoint[ABOUT_KEY] = {
            "recipe": to_plain(self.recipe),
            "classes": list(self.data.classes),
            "multi_label": self.data.multi_label,
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "history": [dict(record) for record in self.records],
            "made_by": self.made_by,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the history of the run from its checkpoint.

        Raises:
            ValueError: the checkpoint does not belong to this run.
        """
        assert isinstance(pl_module, Classifier)
        self.records, self._steps = checkpoint[ABOUT_KEY]["history"], checkpoint["global_step"]
        trainer.should_stop |= stops_early(self.recipe.optim, self.records)
        try:
            check_same_training(checkpoint, pl_module)
        except ValueError as error:
            raise self._not_resumed(str(error)) from error
        self._write_metrics(trainer)  # metrics.csv of a killed run may have more epochs than its last checkpoint

    def _write_metrics(self, trainer: L.Trainer) -> None:
        if self.folder is not None and trainer.is_global_zero:
            self.folder.check()
            self.folder.write_metrics(self.records)

    def _not_resumed(self, why: str) -> ValueError:
        assert self.resumed is not None
        return ValueError(f"{self.resumed.path} cannot be resumed, {why}: start again in another --out")


def _check_same(trainer: L.Trainer, own: dict[str, Any], what: str) -> None:
    """Raise ValueError if a process has other values than the first one."""
    first = trainer.strategy.broadcast(own)
    for name, value in first.items():
        if value != own[name]:
            others = f"{shown(repr(own[name]), 200)}, and the first one {shown(repr(value), 200)}"
            raise ValueError(f"process {trainer.global_rank} has {name} {others}: all need the same {what}")
