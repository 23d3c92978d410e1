"""Data with several labels an image: loss, metric, the best checkpoint, probabilities."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ecanet.cli import main
from ecanet.study.comparison import compare
from ecanet.train import DataConfig, OptimConfig, Recipe, TrainerConfig, fit, validate
from ecanet.train.average_precision import MeanAveragePrecision
from ecanet.train.checkpoint import load_trained
from ecanet.train.classifier import Classifier
from ecanet.train.config import ModelConfig
from ecanet.train.data.loading import ImageData
from ecanet.train.evaluate import data_of, predict
from ecanet.train.explain import explain_prediction

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 12 x 12 pixels, each with none to three of three colours."""
    root, generator = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    lines = ["file,labels"]
    for i in range(40):
        on = generator.random(3) < 0.5
        pixels = generator.integers(0, 60, (12, 12, 3)) + 120 * on
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i}.png")
        lines.append(f"{i}.png,{'|'.join(name for name, there in zip(COLOURS, on, strict=True) if there)}")
    (root / "labels.csv").write_text("\n".join(lines))
    return root / "labels.csv"


@pytest.fixture(scope="module")
def recipe(table: Path) -> Recipe:
    return Recipe(
        ModelConfig(options={"widths": [8, 16]}),
        DataConfig("csv", root=table, val_fraction=0.25, image_size=12, resize=12, batch_size=8),
        OptimConfig(epochs=3, lr=0.05, mixup=0.2, cutmix=0.2, label_smoothing=0.1),
        TrainerConfig(accelerator="cpu"),
    )


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("several")
    result = fit(recipe, out, progress=False)
    means = [record["val/mAP"] for record in result.history]
    assert (result.top1, result.best_top1) == (means[-1], max(means))
    return out


def average_precision(scores: np.ndarray, there: np.ndarray) -> float:
    """Mean over the positives of the precision at their rank."""
    order = np.argsort(-scores)
    hits = there[order].cumsum()
    return float((hits / np.arange(1, len(order) + 1))[there[order] > 0].mean())


def test_validate_gives_loss_and_mean_average_precision_of_the_best(
    run: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_trained(run)
    data = ImageData(data_of(trained, root=table))
    images, labels = zip(*(data.val_dataloader().dataset[i] for i in range(data.validation_images)), strict=True)
    with torch.no_grad():
        logits, targets = trained.network(trained.normalise(torch.stack(images))), torch.stack(labels)
    each = [average_precision(logits[:, i].numpy(), targets[:, i].numpy()) for i in range(3)]
    result = validate(run)
    metrics = result.metrics
    assert result.images().tolist() == targets.sum(0).tolist()
    assert result.of_each_class().tolist() == pytest.approx([100 * value for value in each], abs=1e-3)
    assert metrics["val/mAP"] == pytest.approx(100 * np.mean(each), abs=1e-3)
    assert metrics["val/loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, targets)), abs=1e-5)
    assert metrics["val/mAP"] == pytest.approx(max(r["val/mAP"] for r in load_trained(run / "last.ckpt").history))
    assert "val/top1" not in metrics
    main(["validate", str(run)])
    said = capsys.readouterr().out
    assert f"val/mAP: {metrics['val/mAP']:.2f} %" in said
    for name, value in zip(result.classes, each, strict=True):
        assert re.search(rf"^{name} +{100 * value:.2f} ", said, re.MULTILINE)
    with pytest.raises(ValueError, match="a confusion matrix is for one label per image"):
        result.confusion()
    with pytest.raises(SystemExit, match="--confusion is for one label per image"):
        main(["validate", str(run), "--confusion", str(run / "confusion")])


def test_an_explanation_has_the_probabilities_of_prediction(run: Path, table: Path) -> None:
    trained = load_trained(run)
    data = ImageData(data_of(trained, root=table))
    explanation = explain_prediction(trained, table.parent / "0.png", data)
    (prediction,) = predict(run, [table.parent / "0.png"])
    assert explanation.classes == prediction.classes
    assert explanation.probabilities == pytest.approx(prediction.probabilities, abs=1e-5)
    assert explanation.images > 0


def test_probabilities_are_each_by_itself(run: Path, table: Path) -> None:
    (prediction,) = predict(run, [table.parent / "0.png"])
    trained = load_trained(run)
    assert trained.multi_label
    image = torch.from_numpy(np.array(Image.open(table.parent / "0.png"))).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = trained.network(trained.normalise(image))[0].sigmoid()
    found = dict(zip(prediction.classes, prediction.probabilities, strict=True))
    assert [found[name] for name in trained.classes] == pytest.approx(expected.tolist(), abs=1e-5)
    assert sum(prediction.probabilities) != pytest.approx(1, abs=0.01)


def test_label_smoothing_moves_both_ends_inward() -> None:
    classifier = Classifier(torch.nn.Identity(), 3, [0.5] * 3, [0.5] * 3, multi_label=True)
    logits, labels = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    smoothed = torch.where(labels == 1, 0.95, 0.05)
    expected = -(smoothed * logits.sigmoid().log() + (1 - smoothed) * (1 - logits.sigmoid()).log()).mean()
    assert float(classifier.loss(logits, labels, 0.1)) == pytest.approx(float(expected), abs=1e-6)


def test_classes_that_no_image_has_do_not_count() -> None:
    metric = MeanAveragePrecision(3)
    scores = torch.tensor([[0.9, 0.3, 0.1], [0.8, 0.25, 0.5], [0.7, 0.9, 0.2], [0.6, 0.4, 0.9], [0.5, 0.1, 0.3]])
    labels = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]])
    for part in (slice(0, 3), slice(3, 5)):  # in several batches
        metric.update(scores[part], labels[part])
    first, second = (average_precision(scores[:, i].numpy(), labels[:, i].numpy()) for i in range(2))
    each = metric.of_each_class().tolist()
    assert each == pytest.approx([first, second, float("nan")], nan_ok=True, abs=1e-6)
    assert float(metric.compute()) == pytest.approx((first + second) / 2, abs=1e-6)


def test_the_command_line_names_the_metric(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.source", "csv", "--data.root", str(table), "--data.val_fraction", "0.25"]
    words += ["--data.image_size", "12", "--data.resize", "12", "--model.options", '{"widths": [8, 16]}']
    main(["fit", "--out", str(tmp_path), *words, "--optim.epochs", "1", "--trainer.accelerator", "cpu"])
    said = capsys.readouterr().out
    assert re.search(r"mAP [\d.]+ % after the last epoch", said)
    assert "epoch 1/1: mAP" in said
    assert "top-1" not in said


def test_a_comparison_by_top_1_is_refused_before_it_starts(recipe: Recipe, tmp_path: Path) -> None:
    gates = {"none": None, "eca": "eca"}
    entries = {name: replace(recipe, model=replace(recipe.model, gate=gate)) for name, gate in gates.items()}
    with pytest.raises(ValueError, match=r"images have several labels each, .* ecanet.study.run"):
        compare(entries, [0], tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_single_labels_do_not_fit_a_network_of_several(run: Path, table: Path) -> None:
    single = table.with_name("single.csv")
    single.write_text("file,label\n" + "\n".join(f"{i}.png,{COLOURS[i % 3]}" for i in range(12)))
    with pytest.raises(ValueError, match="the network has several labels per image, and the data has one"):
        validate(run, DataConfig("csv", root=single, val_fraction=0.5, image_size=12, resize=12))
