"""Checkpoints: written completely or not at all, read without unpickling code, sufficient to rebuild the network."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from ecanet.files.state_dicts import safe_load, safe_save, state_dict_in
from ecanet.models.arguments import OPTIONS
from ecanet.train.config import FILE_SOURCES, DataConfig, ModelConfig, is_network_name, model_of_a_file
from ecanet.train.data.splits import MAX_CLASSES, MAX_NAME
from ecanet.train.networks import rebuild_network, without_weights_file
from ecanet.train.run_folder import RunFolder, remedy
from ecanet.untrusted import check_number, listed, shown

#: The key of a checkpoint's entry that describes its network and its run.
ABOUT_KEY = "ecanet"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file and renames it, so that the old checkpoint survives a kill or a full disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; if that fails, the old one stays.

        Raises:
            OSError: it cannot be written; the message names the file and says what to do.
        """
        try:
            safe_save(checkpoint, path)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {remedy(error, Path(path).parent)}") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint with ``weights_only=True``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or not a checkpoint of this library; the message names it.
        """
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint that :func:`ecanet.train.fit` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a checkpoint of this library; the message names it.
    """
    checkpoint = safe_load(path, map_location or "cpu")
    if not isinstance(checkpoint, dict) or ABOUT_KEY not in checkpoint:
        raise ValueError(
            f"{path} is a checkpoint, but not one that `ecanet fit` wrote: "
            "for the authors' weights use ecanet.models.load_official"
        )
    return checkpoint


class SaveCheckpoints(Checkpoint):
    """Writes ``last.ckpt`` after every epoch, and ``best.ckpt`` whenever validation top-1, or mAP, exceeds its best.

    It replaces Lightning's ModelCheckpoint, which writes its last checkpoint only when it also writes a best one.

    Args:
        folder: Folder to write into; checked before every write.
        every_steps: Within an epoch, also write ``last.ckpt`` after every this many steps.
    """

    def __init__(self, folder: RunFolder, every_steps: int | None = None) -> None:
        self.folder, self.every_steps = folder, every_steps
        self.best = -1.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after a step within the epoch; after the last step, :meth:`on_train_epoch_end` saves."""
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # accumulated gradients cannot be saved
        is_due = self.every_steps and is_step and trainer.global_step % self.every_steps == 0
        if is_due and not trainer.is_last_batch:
            check_finite(float(outputs["loss"]), trainer)
            self._save(trainer, "last.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the validation."""
        check_finite(float(trainer.callback_metrics["train/loss_epoch"]), trainer)
        reached = float(trainer.callback_metrics[str(pl_module.monitor)])
        if reached > self.best:
            self.best = reached
            # Write best before last: a run killed between the two repeats the epoch and writes the same best again.
            self._save(trainer, "best.ckpt")
        self._save(trainer, "last.ckpt")

    def _save(self, trainer: L.Trainer, name: str) -> None:
        self.folder.check()
        trainer.save_checkpoint(self.folder.path / name)

    def state_dict(self) -> dict[str, float]:
        """The best top-1 or mAP so far, in per cent."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Set the best top-1 or mAP of the run that is resumed."""
        self.best = state_dict["best"]


def check_finite(loss: float, trainer: L.Trainer) -> None:
    """Stop a run that diverged before it replaces a checkpoint.

    Raises:
        ValueError: the loss is not finite.
    """
    if not math.isfinite(loss):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        raise ValueError(
            f"the training loss is {loss} in epoch {trainer.current_epoch + 1}, step {trainer.global_step}, at a "
            f"learning rate of {rate:.3g}: the run diverged. No checkpoint was replaced; try a lower optim.lr, a "
            "longer optim.warmup_epochs or optim.clip_norm"
        )


@dataclass
class TrainedNetwork:
    """A network from a checkpoint, with everything needed to use it.

    Attributes:
        network: The network with its weights, in eval mode.
        classes: Class names in label order.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel.
        recipe: The parts of its recipe that define the network and its input, as plain values.
        history: One record for each epoch.
        multi_label: Whether an image may have several of the classes: their probabilities are then sigmoids.
    """

    network: nn.Module
    classes: list[str]
    mean: list[float]
    std: list[float]
    recipe: dict[str, Any]
    history: list[dict[str, float]]
    multi_label: bool = False

    def normalise(self, images: Tensor) -> Tensor:
        """The network's input, float32, from uint8 images ``(N, 3, H, W)``."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities ``(N, classes)`` for normalised images; if the network is multi-label, each is independent."""
        logits = self.network(images).float()
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


def load_trained(path: str | os.PathLike[str], build: str | None = None) -> TrainedNetwork:
    """Build the network of a checkpoint again.

    Args:
        path: A checkpoint, or a run's folder, which means its ``best.ckpt``.
        build: ``module:function`` of your own, if such a function built the network (``model.build``).

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: its network is from timm, which is not installed, or ``build`` cannot be imported.
        ValueError: it is not a checkpoint of this library; or its network was built by a function, and ``build`` is
            None.

    Example:
        >>> load_trained("runs/fashion").classes  # doctest: +SKIP
    """
    path = Path(path)
    path = path / "best.ckpt" if path.is_dir() else path
    checkpoint = read_checkpoint(path)
    about = check_about(checkpoint[ABOUT_KEY], path)
    state = checkpoint.get("state_dict")
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if str(key).startswith("network.")}
    config = without_weights_file(_with_users_function(ModelConfig(**about["recipe"]["model"]), build, path))
    network = rebuild_network(config, len(about["classes"]), state_dict_in(state, str(path)), path)
    kept = {key: about[key] for key in ("classes", "mean", "std", "recipe", "history", "multi_label")}
    return TrainedNetwork(network, **kept)


def _with_users_function(config: ModelConfig, build: str | None, path: Path) -> ModelConfig:
    """The ``model`` block of a checkpoint with the function that the user gives; its own is never called."""
    if config.build is None and build is not None:
        raise ValueError(f"model.build={build} was given, but {path} describes {config.name}: leave it out")
    if config.build is not None and build is None:
        raise ValueError(
            f"the network in {path} was built by {config.build}, and a checkpoint cannot call functions: if you trust "
            f"that one, give it with --model.build {config.build} (in Python build={config.build!r})"
        )
    return replace(config, build=build)


#: Largest number of epochs, and of values in the record of one.
_MAX_EPOCHS, _MAX_RECORD = 1_000_000, 100
#: Fields of ``data`` about the network's input, and about how labels are read and split; none is a path.
_INPUT = (
    *("source", "image_size", "resize", "val_fraction", "split_seed"),
    *("image_column", "label_column", "label_separator"),
)


def check_about(about: object, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check a checkpoint's description of its network, and return it without settings for the machine.

    Args:
        about: The checkpoint's entry :data:`ABOUT_KEY`.
        path: The file, for errors.

    Returns:
        ``classes``, ``multi_label``, ``mean``, ``std``, ``history`` and ``recipe``. The recipe keeps ``model``, and of
        ``data`` the fields in :data:`_INPUT`; paths, downloads, processes and devices are left out.

    Raises:
        ValueError: a part is missing or wrong; the message names the file and the part.
    """
    try:
        if not isinstance(about, dict):
            raise TypeError(f"it must say what its network is, got {shown(about)}")
        recipe = about.get("recipe")
        if not isinstance(recipe, dict) or not all(isinstance(recipe.get(k), dict) for k in ("model", "data")):
            raise TypeError("it must hold its recipe with the blocks model and data")
        history = about.get("history")
        _check_labels(about.get("classes"), about.get("multi_label", False))
        for name, low in (("mean", -1e3), ("std", 1e-6)):
            values = about.get(name)
            if not isinstance(values, list) or len(values) != 3:
                raise ValueError(f"{name} must be three numbers")
            for value in values:
                check_number(value, name, low, 1e3)
        if not isinstance(history, list) or len(history) > _MAX_EPOCHS or not all(map(_is_record, history)):
            raise ValueError("history must be a list with a record for each epoch: numbers by short names")
        model = _checked_model(recipe["model"])
        input_settings = {key: recipe["data"].get(key, getattr(DataConfig, key)) for key in _INPUT}
        has_files = input_settings["source"] in FILE_SOURCES
        DataConfig(**input_settings, root=Path() if has_files else None)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged, or not a checkpoint that `ecanet fit` wrote: {shown(str(error), 300)}"
        ) from error
    kept = {key: about[key] for key in ("classes", "mean", "std", "history")}
    kept["multi_label"] = about.get("multi_label", False)
    return {**kept, "recipe": {"model": model, "data": input_settings}}


def _check_labels(classes: object, multi_label: object) -> None:
    if not isinstance(classes, list) or not 1 <= len(classes) <= MAX_CLASSES:
        raise ValueError(f"classes must be a list of 1 to {MAX_CLASSES:,} names")
    if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in classes):
        raise ValueError(f"classes must be names of at most {MAX_NAME} characters")
    if not isinstance(multi_label, bool):
        raise TypeError(f"multi_label must be true or false, got {shown(multi_label)}")


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or len(record) > _MAX_RECORD:
        return False
    names = all(isinstance(name, str) and len(name) <= MAX_NAME for name in record)
    return names and all(type(value) in (int, float) for value in record.values())


def _checked_model(block: dict[str, Any]) -> dict[str, Any]:
    """The block ``model`` of a checkpoint, with former names of fields replaced.

    Raises:
        TypeError, ValueError: a value is not allowed. No allowed value can open a file.
    """
    model = model_of_a_file(block, "its recipe")
    if unknown := [key for key in model if key not in ModelConfig.__dataclass_fields__]:
        raise ValueError(f"recipe.model has no {listed(map(str, unknown), 5)}")
    name, weights = model.get("name"), model.get("weights")
    if weights is not None and not isinstance(weights, str):
        raise TypeError(f"recipe.model.weights must be a text or null, got {shown(weights)}")
    if model.get("build") is None and not is_network_name(name):
        raise ValueError(
            f"recipe.model.name must be one of {', '.join(OPTIONS)}, torchvision/NAME or timm/NAME, got {shown(name)!r}"
        )
    ModelConfig(**model)
    return model
