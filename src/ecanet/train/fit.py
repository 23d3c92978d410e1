"""Train by a recipe, or resume a run."""

import contextlib
import json
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ecanet.files.atomic import remove_partial_files
from ecanet.train.checkpoint import SafeCheckpointIO, SaveCheckpoints
from ecanet.train.classifier import Classifier
from ecanet.train.config import ModelConfig, Recipe, to_plain
from ecanet.train.data.loading import ImageData, image_size_of
from ecanet.train.history import History
from ecanet.train.loggers import build_loggers, logging_to
from ecanet.train.networks import build_network, without_insertion_file, without_weights_file
from ecanet.train.processes import EndTogether
from ecanet.train.progress import Progress
from ecanet.train.quiet import quiet_lightning
from ecanet.train.resume import Resumed, last_state, made_by
from ecanet.train.run_folder import FILES_OF_A_RUN, RunFolder, how_to_go_on


@dataclass
class FitResult:
    """The result of a finished training run.

    Attributes:
        top1: Validation top-1 after the last epoch, in per cent; mean average precision for multi-label data.
        best_top1: The highest of all epochs.
        history: One record for each epoch: ``epoch``, ``val/top1``, ``val/top5`` (with fewer than 5 classes
            ``val/topN``) or ``val/mAP``, ``val/loss``, ``train/loss``, ``seconds``. The last two are those of the first
            process since its last start.
        folder: Folder of best.ckpt, last.ckpt and the logs; None if nothing was written.
        versions: Versions of ecanet and torch, kind of device, kernels, and number of threads of a CPU; several records
            if they changed during the run.
    """

    top1: float
    best_top1: float
    history: list[dict[str, float]]
    folder: Path | None
    versions: list[dict[str, str]]


def fit(
    recipe: Recipe,
    out: str | Path | None,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitResult:
    """Train a network by a recipe.

    On the same machine and versions the same recipe gives the same weights bit for bit, even if the run is killed and
    resumed in between.

    Args:
        recipe: Network, data, optimisation and machine.
        out: Folder for best.ckpt, last.ckpt, recipe.json, metrics.csv (a row for each epoch) and the logs of
            ``trainer.loggers``; None writes nothing.
        resume: Go on from ``out/last.ckpt``; if there is none, start from the beginning. A larger ``optim.epochs``
            extends a run.
        progress: Print a line for each epoch and, on a terminal, show a bar.
        on_epoch: Called with every epoch's record.

    Returns:
        Accuracies and the record of each epoch.

    Raises:
        FileExistsError: ``out`` already holds a run and ``resume`` is False.
        ValueError: data or configuration are wrong, or a run cannot be resumed exactly, as the recipe, the number of
            processes or the pictures differ.
        BlockingIOError: another run is writing into ``out``.
        OSError: a checkpoint cannot be written (the last one is intact), or ``out`` was removed during the run.
        KeyboardInterrupt: Ctrl-C was pressed; a printed line says how to go on.
        SystemExit: the process got SIGTERM; the status is 143, and a printed line says how to go on.
        RuntimeError: another process of the run ended; the message says how to go on.

    Warns:
        UserWarning: the run goes on with other versions, kernels or threads than it started with; or its warm-up is
            shortened because the recipe has too few epochs for it.

    Example:
        >>> fit(Recipe(optim=OptimConfig(epochs=1)), out="runs/try").top1  # doctest: +SKIP
    """
    recipe = replace(recipe, model=without_insertion_file(recipe.model))
    if recipe.optim.warmup != recipe.optim.warmup_epochs and getattr(rank_zero_only, "rank", 0) == 0:
        warnings.warn(
            f"optim.warmup_epochs={recipe.optim.warmup_epochs:g} is not below optim.epochs={recipe.optim.epochs}: the "
            f"warm-up takes {recipe.optim.warmup:.2g} epochs",
            stacklevel=2,
        )
    with quiet_lightning():
        if out is None:
            return _fit(recipe, None, None, progress, on_epoch)
        with RunFolder(Path(out), first=getattr(rank_zero_only, "rank", 0) == 0) as folder:
            return _fit(recipe, folder, last_state(recipe, folder.path / "last.ckpt", resume), progress, on_epoch)


def _fit(
    recipe: Recipe,
    folder: RunFolder | None,
    resumed: Resumed | None,
    progress: bool,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> FitResult:
    network_config = recipe.model
    if resumed is not None:  # the file of initial weights may no longer exist; the recipe still names it
        recipe = replace(recipe, model=replace(recipe.model, weights=resumed.recipe["model"].get("weights")))
        network_config = without_weights_file(recipe.model)
    history = History(recipe, folder, resumed, on_epoch)
    callbacks: list[Callback] = [history]
    if recipe.optim.ema is not None:
        # The average includes buffers; BatchNorm's statistics are averages anyway. With this function frozen values
        # stay exactly the same; the weighted sum of EMAWeightAveraging would round them.
        callbacks.append(WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(recipe.optim.ema)))
    display = Progress(lambda: history.records)
    if progress:
        callbacks.append(display)
    if folder:
        callbacks.append(SaveCheckpoints(folder, recipe.trainer.checkpoint_steps))
    try:
        loggers = build_loggers(recipe.trainer.loggers, folder.path) if folder else []
        trainer = _build_trainer(recipe, callbacks, loggers)
    except MisconfigurationException as error:
        raise ValueError(f"the trainer block does not fit this machine: {error}") from error
    _check_launcher(trainer)
    together = EndTogether(trainer, lambda: how_to_go_on(folder.path) if folder else "run the same command again")
    trainer.callbacks.append(together)  # type: ignore[attr-defined]
    try:
        # Reading the pictures may take long, and another process may end meanwhile.
        with folder.errors_named() if folder else contextlib.nullcontext(), together, display:
            # This seeds the global generators, for the initial weights and Lightning's workers.
            L.seed_everything(recipe.trainer.seed, workers=True, verbose=False)
            data = history.data = ImageData(recipe.data, recipe.trainer.seed)
            if resumed is None or recipe.data.verify:
                data.verify(trainer.is_global_zero)
            history.made_by = made_by(trainer, data, resumed)
            classifier = build_classifier(recipe, network_config, data, trainer.world_size, is_new=resumed is None)
            trainer.log_every_n_steps = min(trainer.log_every_n_steps, classifier.steps_per_epoch)  # type: ignore[attr-defined]
            if folder and trainer.is_global_zero:
                remove_partial_files(folder.path, FILES_OF_A_RUN)
                folder.write_file("recipe.json", json.dumps(to_plain(recipe), indent=2) + "\n")
            with logging_to(trainer.loggers):
                trainer.fit(classifier, datamodule=data, ckpt_path=None if resumed is None else resumed.path)
    except (KeyboardInterrupt, SystemExit) as interrupted:
        if folder and trainer.is_global_zero:
            print(f"Interrupted: {how_to_go_on(folder.path)}.", flush=True)
        if not isinstance(interrupted, SystemExit) or isinstance(interrupted.__context__, KeyboardInterrupt):
            raise
        # Lightning turns SIGTERM into an exit status of 0.
        raise SystemExit(interrupted.code or 128 + signal.SIGTERM) from interrupted
    records = history.records
    accuracies = [record[classifier.monitor] for record in records]
    versions = history.made_by["versions"]
    return FitResult(accuracies[-1], max(accuracies), records, folder.path if folder else None, versions)


def build_classifier(
    recipe: Recipe, network: ModelConfig, data: ImageData, processes: int, is_new: bool = True
) -> Classifier:
    """Build a network, and the Lightning module that trains it by a recipe.

    Args:
        recipe: The recipe.
        network: What to build, in place of the recipe's own ``model`` block.
        data: The pictures.
        processes: Number of processes.
        is_new: Whether to check that a network of another library classifies these pictures.

    Raises:
        TypeError, ValueError: the network cannot be built, or ``optim.freeze`` does not fit it.
    """
    return Classifier(
        build_network(network, len(data.classes), image_size_of(recipe.data) if is_new else None),
        len(data.classes),
        data.mean,
        data.std,
        recipe.optim,
        data.batches_per_epoch(processes),
        recipe.trainer.seed,
        recipe.trainer.channels_last,
        data.multi_label,
        recipe.trainer.compile,
    )


def _build_trainer(
    recipe: Recipe, callbacks: list[Callback], loggers: list[Logger], strategy: str | None = None
) -> L.Trainer:
    config = recipe.trainer
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=strategy or config.strategy,
        precision=config.precision,  # type: ignore[arg-type]
        max_epochs=recipe.optim.epochs,
        gradient_clip_val=recipe.optim.clip_norm,
        accumulate_grad_batches=recipe.optim.accumulate,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[SafeCheckpointIO()],
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(callback, SaveCheckpoints) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_steps,
    )
    if trainer.world_size > 2 and strategy is None and config.strategy in ("auto", "ddp"):
        # Otherwise DDP reorders its buckets after the first step. A resumed run would then sum three or more gradients
        # in another order, and its weights would not be identical.
        return _build_trainer(recipe, callbacks, loggers, "ddp_find_unused_parameters_true")
    return trainer


def _check_launcher(trainer: L.Trainer) -> None:
    """Raise if Lightning would train in copies of this process, as it does in notebooks."""
    launcher = trainer.strategy.launcher
    if launcher is not None and hasattr(launcher, "_start_method"):
        raise ValueError(
            f"trainer.devices={trainer.num_devices} needs a script or the command line, where each process starts "
            "from the beginning: in a notebook use trainer.devices=1"
        )
