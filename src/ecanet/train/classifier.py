"""The Lightning module: one network, its loss, its optimiser and its metrics."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from ecanet.train.average_precision import MeanAveragePrecision
from ecanet.train.config import OptimConfig
from ecanet.train.data.loading import mix_seed
from ecanet.train.parameters import build_optimizer, freeze_

_STEP_STREAM = 3
#: Weight of an auxiliary head's loss: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 5.
AUXILIARY = 0.3
Batch = tuple[Tensor, Tensor]


class Classifier(L.LightningModule):
    """Trains a network to classify images.

    Args:
        network: ``(N, 3, H, W)`` to logits ``(N, classes)``. In training it may return a tuple of these and the logits
            of auxiliary heads, whose losses are added with the weight :data:`AUXILIARY`.
        num_classes: Number of classes.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel.
        optim: The recipe's ``optim`` block.
        batches_per_epoch: Number of batches of each process in an epoch.
        seed: Seed of dropout and mixup.
        channels_last: Memory format of images and convolutions.
        multi_label: Whether an image may have several labels, which are then float ``(N, classes)`` of 0 and 1. The
            loss is then the binary cross entropy of each class, and the metric mean average precision.
        compile: Compile the network.

    Attributes:
        monitor: Name of the metric by which epochs are compared; higher is better.

    Raises:
        ValueError: ``optim.freeze`` does not fit the network.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        optim: OptimConfig | None = None,
        batches_per_epoch: int = 1,
        seed: int = 0,
        channels_last: bool = False,
        multi_label: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self.optim = optim or OptimConfig()
        self.batches_per_epoch = batches_per_epoch
        self._frozen_norms = freeze_(network, list(self.optim.freeze))
        self._keep_statistics()
        if compile:
            # A graph for each shape, without autotuning: a resumed run gets the shapes in another order.
            self.network.compile(dynamic=False, options={"deterministic": True})
        self.seed = seed
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.mixing = _mixup_and_cutmix(self.optim, num_classes)
        self.multi_label = multi_label
        self.monitor = "val/mAP" if multi_label else "val/top1"
        top_k = {f"val/top{k}": MulticlassAccuracy(num_classes, k, average="micro") for k in {1, min(5, num_classes)}}
        metrics = {self.monitor: MeanAveragePrecision(num_classes)} if multi_label else top_k
        self.val_accuracy = MetricCollection(metrics)  # type: ignore[arg-type]
        self.val_loss = MeanMetric(nan_strategy="ignore")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)`` from uint8 images ``(N, 3, H, W)``."""
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.network(pixels.contiguous(memory_format=self.memory_format))

    def train(self, mode: bool = True) -> "Classifier":
        """Set the mode of all modules; frozen norms keep their statistics in every mode."""
        super().train(mode)
        self._keep_statistics()
        return self

    def _keep_statistics(self) -> None:
        for norm in self._frozen_norms:
            norm.eval()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return -(-self.batches_per_epoch // self.optim.accumulate)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout and mixup by seed, batch and process, so that a resumed run draws the same random numbers."""
        index = self.trainer.current_epoch * self.batches_per_epoch + batch_idx
        torch.manual_seed(mix_seed(self.seed, _STEP_STREAM, index, self.trainer.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch, times its share of the step's images."""
        images, labels = batch
        if self.mixing is not None:
            images, labels = self.mixing(images.to(self.mean.dtype), labels)
        outputs = self(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self.loss(logits, labels, self.optim.label_smoothing)
        for auxiliary_logits in auxiliary:
            loss = loss + AUXILIARY * self.loss(auxiliary_logits, labels, self.optim.label_smoothing)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images))
        self.log(
            "lr", self.optim.rate * learning_rate_factor(self.optim, self.trainer.global_step / self.steps_per_epoch)
        )
        return loss if self.optim.accumulate == 1 else loss * self._weight_in_step(batch_idx, len(images))

    def _weight_in_step(self, batch_idx: int, images: int) -> float:
        """The weight of a batch's loss with which the accumulated gradient is the mean over the images of the step.

        Lightning divides the loss of each batch by the number of batches in a step.
        """
        loader: Any = self.trainer.train_dataloader
        full_step = loader.batch_size * self.optim.accumulate
        before = batch_idx // self.optim.accumulate * full_step
        return self.optim.accumulate * images / min(full_step, len(loader.sampler) - before)

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross entropy; for multi-label data, the binary cross entropy averaged over classes."""
        if not self.multi_label:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add one batch to the metrics; returns its logits ``(N, classes)``."""
        images, labels = batch
        logits = self(images).float()
        if self.multi_label:
            self.val_accuracy.update(logits.sigmoid(), labels.long())
        else:
            self.val_accuracy.update(logits, labels)
        self.val_loss.update(self.loss(logits, labels), len(images))
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log top-1 and top-5, or mean average precision, in per cent, for the images of all processes."""
        values = {name: 100 * value for name, value in self.val_accuracy.compute().items()}
        self.log_dict(values, prog_bar=True)
        self.log("val/loss", self.val_loss.compute())
        self.val_accuracy.reset()
        self.val_loss.reset()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Class probabilities ``(N, classes)``: they add up to 1, or are independent if the data is multi-label."""
        logits = self(batch).float()
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe's optimiser and its schedule, advanced every step."""
        optimizer = build_optimizer(self.network, self.optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(self.optim, step / self.steps_per_epoch)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(optim: OptimConfig, epoch: float) -> float:
    """The factor of the learning rate after a number of epochs.

    Args:
        optim: The recipe's ``optim`` block.
        epoch: Epochs done, 0 at the start; may be a fraction.

    Example:
        >>> [learning_rate_factor(OptimConfig(epochs=100, schedule="step"), e) for e in (0, 29.9, 30)]
        [1.0, 1.0, 0.1]
    """
    if epoch < optim.warmup:
        return max(epoch, 0.01) / optim.warmup
    if optim.schedule == "step":
        return optim.gamma ** (int(epoch) // optim.step_epochs)
    if optim.schedule == "exponential":
        return optim.gamma ** int(epoch)
    if optim.schedule == "cosine":
        done = (epoch - optim.warmup) / (optim.epochs - optim.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return 1.0


def _mixup_and_cutmix(optim: OptimConfig, num_classes: int) -> v2.Transform | None:
    kinds: list[v2.Transform] = []
    if optim.mixup:
        kinds.append(v2.MixUp(alpha=optim.mixup, num_classes=num_classes))
    if optim.cutmix:
        kinds.append(v2.CutMix(alpha=optim.cutmix, num_classes=num_classes))
    return v2.RandomChoice(kinds) if kinds else None
