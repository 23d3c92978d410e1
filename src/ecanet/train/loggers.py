"""Creates Lightning's loggers for a run."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only


def build_loggers(names: Sequence[str], folder: Path) -> list[Logger]:
    """Create the loggers that a recipe names; nothing is written yet.

    Args:
        names: Some of ``csv``, ``tensorboard``, ``wandb``.
        folder: The run's folder. Every start of a run gets its own folder below ``logs``, so that a resumed run does
            not change earlier logs.

    Raises:
        ImportError: Weights & Biases is not installed.
    """
    sessions = (f"session_{i}" for i in itertools.count())
    session = next(session for session in sessions if not (folder / "logs" / session).exists())
    loggers: list[Logger] = []
    for name in names:
        if name == "wandb":
            loggers.append(_weights_and_biases(folder, session))
        else:
            loggers.append({"csv": CSVLogger, "tensorboard": TensorBoardLogger}[name](folder, "logs", session))
    return loggers


def _weights_and_biases(folder: Path, session: str) -> Logger:
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ImportError("trainer.loggers=wandb needs wandb: pip install 'ecanet[wandb]'") from error
    project = os.environ.get("WANDB_PROJECT", "ecanet")
    return WandbLogger(name=f"{folder.resolve().name} {session}", save_dir=folder / "logs" / session, project=project)


@contextlib.contextmanager
def logging_to(loggers: Sequence[Logger]) -> Iterator[None]:
    """Keep a run of Weights & Biases open in the first process inside the context, if it is among the loggers.

    Raises:
        ValueError: Weights & Biases does not begin a run, for example without an account.
    """
    wandb_loggers = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    if not wandb_loggers or getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    import wandb

    (logger,) = wandb_loggers
    assert logger.save_dir is not None
    Path(logger.save_dir).mkdir(parents=True, exist_ok=True)  # otherwise wandb writes into a temporary folder
    try:
        run = logger.experiment
    except wandb.Error as error:
        raise ValueError(
            f"trainer.loggers=wandb: Weights & Biases does not begin a run ({error}): `wandb login`, or "
            "WANDB_MODE=offline in the environment"
        ) from error
    try:
        yield
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
