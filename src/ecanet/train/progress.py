"""Shows the progress of a run: a bar on a terminal, and in any case one line for each epoch."""

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

#: Seconds between two updates of the bar: each reads the loss and so waits for the device.
_PAUSE = 0.1
#: Columns left free, as the ^C that a terminal writes would wrap a full line.
_MARGIN = 3
#: Names of the loggers whose handlers print above the bar.
_LOGGERS = ("", "lightning.pytorch", "lightning.fabric")


class _Bar(tqdm):
    monitor_interval = 0  # no monitor thread, as every change draws the bar


class _LinesAboveBar:
    """A stream whose complete lines are printed above the bar of another stream."""

    def __init__(self, stream: TextIO, bars: TextIO) -> None:
        self._stream, self._bars, self._unfinished = stream, bars, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        lines, newline, self._unfinished = (self._unfinished + text).rpartition("\n")
        if newline:
            with _Bar.external_write_mode(file=self._bars):
                self._stream.write(lines + newline)
                self._stream.flush()
        return len(text)

    def finish(self) -> None:
        """Print the line that has no end yet."""
        self._stream.write(self._unfinished)
        self._unfinished = ""


class Progress(Callback):
    """Shows the progress of training, validation or prediction; only the first process of a run prints.

    After each epoch it prints a line to stdout. If stderr is a terminal, it shows a bar inside the context, and
    whatever is printed, warned or logged meanwhile appears above it. Without a terminal there is no bar.

    Args:
        records: Returns the run's records, one for each epoch; the last one is complete when its epoch ends. None for
            validation and prediction.
    """

    def __init__(self, records: Callable[[], list[dict[str, float]]] | None = None) -> None:
        self._records = records
        self._bar: _Bar | None = None
        self._open = contextlib.ExitStack()
        self._started_at = self._last_shown = 0.0
        self._batches_before = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar = None
        self._open.close()

    # Methods that Lightning calls. None of them runs the network or draws random numbers.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to measure the time."""
        self._started_at, self._batches_before = time.perf_counter(), self._batches_done(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show an empty bar."""
        self._show(trainer, self._epoch(trainer), 0, trainer.num_training_batches, at_once=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the progress of the epoch."""
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
        """Show the progress of the validation."""
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
        """Show the progress of the prediction."""
        self._show(trainer, "predicting", batch_idx + 1, trainer.num_predict_batches[dataloader_idx])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's line."""
        if self._records is None or not trainer.is_global_zero:
            return
        record = self._records()[-1]
        losses = f"loss {record['val/loss']:.3g} (train {record['train/loss']:.3g})"
        took = f"took {tqdm.format_interval(record['seconds'])}"
        left = self._time_left(trainer) if trainer.current_epoch + 1 < int(trainer.max_epochs or 0) else []
        parts = [self._epoch(trainer) + ": " + accuracy(record), losses, took, *left]
        # Flush, so that a closed pipe raises here and not only when Python exits.
        print(", ".join(parts), flush=True)

    def _epoch(self, trainer: L.Trainer) -> str:
        last = str(trainer.max_epochs)
        return f"epoch {trainer.current_epoch + 1:{len(last)}}/{last}"

    def _batches_done(self, trainer: L.Trainer) -> int:
        """Training batches since the beginning of the run, also those before it was resumed."""
        return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)

    def _time_left(self, trainer: L.Trainer) -> list[str]:
        """The time until the last epoch is done, from the time of the batches since this process started."""
        done = self._batches_done(trainer)
        if done == self._batches_before or trainer.state.fn != "fit":
            return []
        batches = int(trainer.num_training_batches) * int(trainer.max_epochs or 0)
        seconds = (time.perf_counter() - self._started_at) / (done - self._batches_before) * (batches - done)
        return [f"left {tqdm.format_interval(seconds)}"]

    def _show(self, trainer: L.Trainer, what: str, done: int, total: float, at_once: bool = False) -> None:
        if not trainer.is_global_zero or not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = self._open_bar()
        now = time.perf_counter()
        if now - self._last_shown < _PAUSE and not at_once:
            return
        self._last_shown = now
        records = self._records() if self._records is not None else []
        last_accuracy = [accuracy(records[-1])] if records else []
        loss = trainer.callback_metrics.get("train/loss_step") if trainer.training else None
        losses = [] if loss is None else [f"loss {float(loss):.3g}"]
        self._bar.n, self._bar.total = done, total
        self._bar.ncols = columns()
        # The loss comes last, as the end is cut off if there is no room.
        text = ", ".join([*last_accuracy, *self._time_left(trainer), *losses])
        self._bar.bar_format = f"{what} {{percentage:3.0f}} %|{{bar}}| {text}"
        self._bar.refresh()

    def _open_bar(self) -> _Bar:
        out, err = sys.stdout, sys.stderr
        above = {id(stream): _LinesAboveBar(stream, err) for stream in (out, err)}
        for stream in above.values():
            self._open.callback(stream.finish)
        self._open.callback(err.write, "\r\x1b[K")  # clears the line, also of a ^C that the terminal wrote
        bar = self._open.enter_context(_Bar(file=err, leave=False))
        for name in _LOGGERS:
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and id(handler.stream) in above:
                    self._open.callback(handler.setStream, handler.setStream(above[id(handler.stream)]))
        self._open.enter_context(contextlib.redirect_stdout(above[id(out)]))
        self._open.enter_context(contextlib.redirect_stderr(above[id(err)]))
        return bar


def columns() -> int:
    """Number of columns for a bar on stderr, which must be a terminal."""
    return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - _MARGIN


def accuracy(record: dict[str, float]) -> str:
    """The accuracy in an epoch's record, as text."""
    key, name = ("val/mAP", "mAP") if "val/mAP" in record else ("val/top1", "top-1")
    return f"{name} {record[key]:.2f} %"
