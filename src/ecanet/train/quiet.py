"""Hides messages of Lightning that do not apply here."""

import itertools
import logging
import warnings


class quiet_lightning:  # noqa: N801
    """Hides Lightning's advertisements, advice that does not apply here, and tracebacks of loading processes.

    Ctrl-C stays a KeyboardInterrupt.
    """

    _irrelevant = (
        "does not have many workers",  # images in memory need none
        "The number of training batches",  # small data
        "You defined a `validation_step` but have no `val_dataloader`",
        "find_unused_parameters=True was specified in DDP constructor",  # it is set for the order of the buckets
        "Found \\d+ module\\(s\\) in eval mode",  # frozen norms
        "Experiment logs directory",
        "Checkpoint directory",
        "You're resuming from a checkpoint that ended before the epoch ended",  # ImageData handles this
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own call
    )

    def __enter__(self) -> None:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        for message in self._irrelevant:
            warnings.filterwarnings("ignore", message=f".*{message}")
        self._loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.WARNING)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
        self._catch.__exit__(None, None, None)
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # Lightning turns Ctrl-C into exit status 1
        kinds = (OSError, TypeError, ValueError, RuntimeError, LookupError, ArithmeticError)
        if isinstance(error, kinds) and str(error).startswith("Caught "):
            # torch re-raises an error of a loading process with the traceback in its message.
            raise type(error)(without_traceback(str(error))) from error


def without_traceback(text: str) -> str:
    """The message of an error at the end of its traceback."""
    lines = text.strip().splitlines()
    last_frame = max((i for i, line in enumerate(lines) if line.startswith('  File "')), default=0)
    message = itertools.dropwhile(lambda line: line.startswith("  "), lines[last_frame:])
    return "\n".join(message).partition(": ")[2]
