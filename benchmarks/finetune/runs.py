"""One run of ``benchmarks.finetune``: a trained network, with gates or without, and some steps on other pictures."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.finetune import pretrained
from ecanet import insert_gates_
from ecanet.train import DataConfig
from ecanet.train.data import TensorImages, embedded
from ecanet.train.data.loading import EpochSampler, test_transform

#: The baseline first. In the others ECA follows every block; they differ in ``preserve``.
PLAIN, KEPT, RANDOM = "no gate", "ECA, function kept", "ECA, random gate"
WAYS: Mapping[str, bool | None] = {PLAIN: None, KEPT: True, RANDOM: False}
CLASSES = 10
#: Shares of the steps after which the network is evaluated; denser at the start, where the ways differ.
EVALUATED_AT = (0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1)
_WARMUP_STEPS = 5
_EVALUATION_BATCH = 100


class Inserted(NamedTuple):
    """A network right after insertion, still with the classifier it was trained with.

    Attributes:
        network: The network, already with the new classifier.
        photographs_right: How many of the photographs the old classifier gets right.
        logits_moved: Norm of the change of the photographs' logits, relative to their norm before insertion.
    """

    network: nn.Module
    photographs_right: int
    logits_moved: float


def evaluated_after(steps: int) -> list[int]:
    """Numbers of steps after which to evaluate, 0 and the last among them."""
    return sorted({round(share * steps) for share in EVALUATED_AT})


def insert(name: str, way: str, seed: int, photographs: int) -> Inserted:
    """Load the trained network, insert gates, evaluate it on photographs, and give it a new classifier.

    Args:
        name: Name in :data:`benchmarks.finetune.pretrained.NETWORKS`.
        way: One of :data:`WAYS`.
        seed: Seed of the new classifier, the same for every way, and of random gates.
        photographs: How many photographs to use, at most 20.
    """
    network = pretrained.load(name)
    torch.manual_seed(seed)
    *_, (where, old) = ((where, m) for where, m in network.named_modules() if isinstance(m, nn.Linear))
    head = nn.Linear(old.in_features, CLASSES)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    images, labels = (values[:photographs] for values in pretrained.photographs(name))
    with torch.no_grad():
        before = network(images)
        preserve = WAYS[way]
        if preserve is not None:
            insert_gates_(network, "eca", preserve=preserve)
        after = network(images)
    network.set_submodule(where, head)
    right = int((after.argmax(1) == labels).sum())
    return Inserted(network, right, float((after - before).norm() / before.norm()))


def finetune(
    way: str, seed: int, settings: Mapping[str, Any], on_evaluation: Callable[[int, float], None]
) -> dict[str, Any]:
    """Fine-tune all weights, and return how it went.

    The same seed gives every way the same classifier, the same pictures in the same order and the same dropout.

    Args:
        way: One of :data:`WAYS`.
        seed: Seed of the run.
        settings: ``network`` (its name), ``steps``, ``batch``, ``lr``, ``size`` (pixels), ``held_out`` (pictures),
            ``photographs``.
        on_evaluation: Called with the number of steps done and top-1 in per cent.

    Returns:
        ``photographs_right``, ``logits_moved``; ``steps`` and for each of them ``top1`` in per cent and ``loss``, both
        on the held-out pictures; ``train_loss`` of every step, with norms on batch statistics; ``seconds``.
    """
    start = time.monotonic()
    splits = embedded()
    train, test = splits.train, splits.val
    assert isinstance(train, TensorImages)
    assert isinstance(test, TensorImages)
    network, photographs_right, logits_moved = insert(settings["network"], way, seed, settings["photographs"])
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    held_out = _pictures(test, torch.arange(settings["held_out"]), settings)
    order = torch.tensor([index for _, index in EpochSampler(len(train), seed, settings["batch"])])
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    evaluations: list[tuple[int, float, float]] = []
    train_loss: list[float] = []
    torch.manual_seed(seed)  # of dropout
    for step in range(settings["steps"] + 1):
        if step in evaluated_after(settings["steps"]):
            top1, held_out_loss = _evaluate(network, *held_out)
            evaluations.append((step, top1, held_out_loss))
            on_evaluation(step, top1)
        if step == settings["steps"]:
            break
        _set_lr(optimizer, settings["lr"] * _schedule(step, settings["steps"]))
        which = order[step * settings["batch"] : (step + 1) * settings["batch"]]
        images, labels = _pictures(train, which, settings)
        loss = F.cross_entropy(network.train()(images), labels)
        train_loss.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    steps, top1s, losses = zip(*evaluations, strict=True)
    return {
        "photographs_right": photographs_right,
        "logits_moved": float(f"{logits_moved:.4g}"),
        "steps": steps,
        "top1": [round(top1, 3) for top1 in top1s],
        "loss": [round(loss, 4) for loss in losses],
        "train_loss": [round(loss, 4) for loss in train_loss],
        "seconds": round(time.monotonic() - start, 1),
    }


def _pictures(images: TensorImages, which: Tensor, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Grey pictures as the trained network takes them: enlarged, three channels, its own mean and deviation."""
    resize = test_transform(DataConfig("embedded", image_size=settings["size"]))
    trained = pretrained.NETWORKS[settings["network"]]
    pixels = v2.Normalize(trained.mean, trained.std)(resize(images.images[which]).expand(-1, 3, -1, -1) / 255)
    return pixels.contiguous(memory_format=torch.channels_last), images.labels[which]


@torch.no_grad()
def _evaluate(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 in per cent, and cross-entropy."""
    network.eval()
    logits = torch.cat([network(batch) for batch in images.split(_EVALUATION_BATCH)])
    return 100 * float((logits.argmax(1) == labels).float().mean()), float(F.cross_entropy(logits, labels))


def _schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: a linear rise over a few steps, then a linear decay to 0."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - step / steps)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
