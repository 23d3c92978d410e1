"""How far a run is: a bar on a terminal, and one line for each epoch everywhere."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

#: Seconds between two changes of the bar: each waits for the device, to read the loss.
_PAUSE = 0.1
#: Columns left free: in a full line, the ^C that a terminal writes would begin another one.
_MARGIN = 3
_WITH_HANDLERS = ("", "lightning.pytorch", "lightning.fabric")


class _Bar(tqdm):
    monitor_interval = 0  # no thread: it is drawn anew at every change


class _Above:
    """A stream whose lines are printed above the bar of another one, each when it is whole."""

    def __init__(self, stream: TextIO, bars: TextIO) -> None:
        self._stream, self._bars, self._begun = stream, bars, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        lines, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            with _Bar.external_write_mode(file=self._bars):
                self._stream.write(lines + newline)
                self._stream.flush()
        return len(text)

    def finish(self) -> None:
        """Print the line that was only begun."""
        self._stream.write(self._begun)
        self._begun = ""


class Progress(Callback):
    """Shows the progress of training, validation or prediction; only the first process of a run prints.

    After each epoch it prints a line to stdout. If stderr is a terminal, a bar is drawn there while the context lasts,
    and whatever is printed, warned or logged meanwhile appears above it. Without a terminal there is no bar.

    Args:
        records: Returns the run's records, one for each epoch, the last one complete when its epoch ends; None where no
            epochs are counted.
    """

    def __init__(self, records: Callable[[], list[dict[str, float]]] | None = None) -> None:
        self._records = records
        self._bar: _Bar | None = None
        self._open = contextlib.ExitStack()
        self._begun = self._shown = 0.0
        self._before = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar = None
        self._open.close()

    # What Lightning calls. Nothing here computes with the network or draws random numbers.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to measure the time."""
        self._begun, self._before = time.perf_counter(), self._batches_done(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show an empty bar."""
        self._show(trainer, self._epoch(trainer), 0, trainer.num_training_batches, now=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show how far the epoch is."""
        self._show(trainer, self._epoch(trainer), batch_idx + 1, trainer.num_training_batches)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show how far the validation is."""
        what = f"{self._epoch(trainer)}, validating" if trainer.state.fn == "fit" else "validating"
        self._show(trainer, what, batch_idx + 1, trainer.num_val_batches[dataloader_idx])

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show how far the prediction is."""
        self._show(trainer, "predicting", batch_idx + 1, trainer.num_predict_batches[dataloader_idx])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's line."""
        if self._records is None or not trainer.is_global_zero:
            return
        record = self._records()[-1]
        losses = f"loss {record['val/loss']:.3g} (train {record['train/loss']:.3g})"
        took = f"took {tqdm.format_interval(record['seconds'])}"
        left = self._left(trainer) if trainer.current_epoch + 1 < int(trainer.max_epochs or 0) else []
        parts = [self._epoch(trainer) + ": " + accuracy(record), losses, took, *left]
        # A closed pipe is an error here, and not only when Python exits.
        print(", ".join(parts), flush=True)

    def _epoch(self, trainer: L.Trainer) -> str:
        last = str(trainer.max_epochs)
        return f"epoch {trainer.current_epoch + 1:{len(last)}}/{last}"

    def _batches_done(self, trainer: L.Trainer) -> int:
        """Training batches since the run began, whichever process computed them."""
        return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)

    def _left(self, trainer: L.Trainer) -> list[str]:
        """Time until the last epoch is done, from that of the batches since this process began."""
        done = self._batches_done(trainer)
        if done == self._before or trainer.state.fn != "fit":
            return []
        batches = int(trainer.num_training_batches) * int(trainer.max_epochs or 0)
        seconds = (time.perf_counter() - self._begun) / (done - self._before) * (batches - done)
        return [f"left {tqdm.format_interval(seconds)}"]

    def _show(self, trainer: L.Trainer, what: str, done: int, of: float, now: bool = False) -> None:
        if not trainer.is_global_zero or not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = self._begin()
        moment = time.perf_counter()
        if moment - self._shown < _PAUSE and not now:
            return
        self._shown = moment
        records = self._records() if self._records is not None else []
        known = [accuracy(records[-1])] if records else []
        loss = trainer.callback_metrics.get("train/loss_step") if trainer.training else None
        losses = [] if loss is None else [f"loss {float(loss):.3g}"]  # last: it is cut off where there is no room
        self._bar.n, self._bar.total = done, of
        self._bar.ncols = columns()
        said = ", ".join([*known, *self._left(trainer), *losses])
        self._bar.bar_format = f"{what} {{percentage:3.0f}} %|{{bar}}| {said}"
        self._bar.refresh()

    def _begin(self) -> _Bar:
        out, err = sys.stdout, sys.stderr
        above = {id(stream): _Above(stream, err) for stream in (out, err)}
        for stream in above.values():
            self._open.callback(stream.finish)
        self._open.callback(err.write, "\r\x1b[K")  # what the terminal itself wrote there, too: ^C
        bar = self._open.enter_context(_Bar(file=err, leave=False))
        for name in _WITH_HANDLERS:
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and id(handler.stream) in above:
                    self._open.callback(handler.setStream, handler.setStream(above[id(handler.stream)]))
        self._open.enter_context(contextlib.redirect_stdout(above[id(out)]))
        self._open.enter_context(contextlib.redirect_stderr(above[id(err)]))
        return bar


def columns() -> int:
    """Columns that a bar may take on stderr, which is a terminal."""
    return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - _MARGIN


def accuracy(record: dict[str, float]) -> str:
    """The accuracy of an epoch's record, as it is shown."""
    name, shown = ("val/mAP", "mAP") if "val/mAP" in record else ("val/top1", "top-1")
    return f"{shown} {record[name]:.2f} %"
