"""The loss, the schedule, the metrics."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ecanet.models import SmallECAResNet
from ecanet.nn import GATES, build_gate
from ecanet.train import OptimConfig, Recipe, fit, validate
from ecanet.train.checkpoint import load_trained
from ecanet.train.classifier import Classifier, learning_rate_factor
from ecanet.train.data.loading import ImageData
from ecanet.train.evaluate import data_of

EPOCHS = [0, 0.5, 1, 29.99, 30, 60, 99.5]
SCHEDULES = {
    "step": (OptimConfig(epochs=100, schedule="step"), [1, 1, 1, 1, 0.1, 0.01, 0.001]),
    "exponential": (OptimConfig(epochs=100, schedule="exponential", gamma=0.98), [0.98 ** int(e) for e in EPOCHS]),
    "constant": (OptimConfig(epochs=100, schedule="constant"), [1] * 7),
    "cosine": (OptimConfig(epochs=100), [0.5 * (1 + math.cos(math.pi * e / 100)) for e in EPOCHS]),
    "warm-up": (OptimConfig(epochs=100, schedule="constant", warmup_epochs=2), [0.005, 0.25, 0.5, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name: str) -> None:
    optim, factors = SCHEDULES[name]
    assert [learning_rate_factor(optim, epoch) for epoch in EPOCHS] == pytest.approx(factors)


def test_cosine_ends_at_zero_after_its_warm_up() -> None:
    optim = OptimConfig(epochs=10, warmup_epochs=2)
    assert learning_rate_factor(optim, 2) == 1
    assert learning_rate_factor(optim, 10) == pytest.approx(0)


def test_images_are_normalised_once() -> None:
    network = torch.nn.Identity()
    classifier = Classifier(network, 10, [0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    out = classifier(torch.full((1, 3, 2, 2), 51, dtype=torch.uint8))
    assert out[0, :, 0, 0].tolist() == pytest.approx([-3.0, -1.0, -1 / 3])


def test_channels_last_reaches_the_network() -> None:
    seen = []
    network = SmallECAResNet(widths=[8])
    network.conv1.register_forward_hook(lambda m, args, out: seen.append((args[0], m.weight, out)))
    Classifier(network, 10, [0.5] * 3, [0.5] * 3, channels_last=True)(torch.zeros(2, 3, 6, 6, dtype=torch.uint8))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen[0])


def test_metrics_are_those_of_all_images(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(epochs=2, mixing=0.0)
    fit(recipe, tmp_path, progress=False)
    trained = load_trained(tmp_path)
    images = ImageData(data_of(trained, root=recipe.data.root))
    pairs = [images.splits.val[i] for i in range(len(images.splits.val))]  # type: ignore[arg-type]
    with torch.no_grad():
        logits = trained.network(trained.normalise(torch.stack([image for image, _ in pairs])))
    labels = torch.tensor([label for _, label in pairs])
    result = validate(tmp_path, accelerator="cpu")
    metrics = result.metrics
    assert metrics["val/top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert metrics["val/top3"] == 100, "three classes"
    assert torch.equal(result.predicted, logits.argmax(1))
    assert torch.equal(result.labels, labels)
    assert result.images().tolist() == [int((labels == label).sum()) for label in range(3)]
    assert torch.equal(result.confusion().sum(1), result.images())
    torch.testing.assert_close(result.of_each_class(), 100 * result.confusion().diagonal() / result.images().double())


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_trains_an_epoch_in_float32_and_bf16_and_loads_as_it_was_saved(
    tiny: Callable[..., Recipe], tmp_path: Path, gate: str
) -> None:
    for precision in ("32-true", "bf16-mixed"):
        recipe = tiny(epochs=1, gate=gate, precision=precision, checkpoint_steps=None, lr=0.05)
        recipe = replace(recipe, model=replace(recipe.model, options={"widths": [16, 32]}))
        fit(recipe, tmp_path / precision, progress=False)
        trained = load_trained(tmp_path / precision)
        for _, gated in trained.network.gated_norms():
            new = build_gate(gate, gated.channels)
            pairs = list(zip(gated.parameters(), new.parameters(), strict=True))
            assert type(gated) is type(new)
            assert all(t.isfinite().all() for t in gated.state_dict().values())
            assert not pairs or any(not torch.equal(p, q) for p, q in pairs), "not as at its start"
        logits = trained.network(torch.randn(4, 3, 12, 12))
        assert logits.isfinite().all()


def test_a_run_that_diverges_stops_before_it_saves(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training loss is (nan|inf) in epoch 1.*optim\.lr"):
        fit(tiny(lr=1e30, checkpoint_steps=None), tmp_path, progress=False)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"clip_norm": 0.1}, {"label_smoothing": 0.2}, {"nesterov": True}])
def test_every_option_changes_the_training(
    tiny: Callable[..., Recipe], tmp_path: Path, changes: dict[str, object]
) -> None:
    for name, options in (("without", {}), ("with", changes)):
        fit(tiny(epochs=1, mixing=0.0, **options), tmp_path / name, progress=False)
    a, b = (load_trained(tmp_path / name / "last.ckpt").network.state_dict() for name in ("without", "with"))
    assert not torch.equal(a["fc.weight"], b["fc.weight"])


def test_channels_last_trains_to_the_same_accuracy(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(epochs=2, mixing=0.0)
    other = replace(recipe, trainer=replace(recipe.trainer, channels_last=True))
    losses = [fit(r, None, progress=False).history[-1]["val/loss"] for r in (recipe, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
