"""What a network makes of one image, gate by gate."""

from pathlib import Path

import pytest
import torch

from ecanet.models import small_eca_resnet
from ecanet.networks.running import gates
from ecanet.nn import GATES, Gate
from ecanet.train.checkpoint import TrainedNetwork
from ecanet.train.config import DataConfig
from ecanet.train.data.loading import ImageData
from ecanet.train.explain import explain_prediction


def trained(gate: str | None, widths: list[int]) -> TrainedNetwork:
    torch.manual_seed(1)
    network = small_eca_resnet(gate=gate, widths=widths, num_classes=3).eval()
    data = {"source": "image_folder", "image_size": 12, "resize": 12}
    return TrainedNetwork(network, ["bag", "boot", "coat"], [0.5] * 3, [0.2] * 3, {"data": data}, [])


@pytest.fixture(scope="module")
def pictures(image_folder: Path) -> ImageData:
    return ImageData(DataConfig(source="image_folder", root=image_folder, image_size=12, resize=12))


@pytest.mark.parametrize("gate", GATES)
def test_the_gates_of_every_kind_are_what_channels_are_multiplied_by(gate: str, image_folder: Path) -> None:
    network, seen = trained(gate, [16, 32]), {}

    def see(name: str, module: Gate, x: torch.Tensor, out: torch.Tensor) -> None:
        ratio = (out / x).mean((2, 3)) if module.sees_map else out.std((2, 3)) / x.std((2, 3))  # some add a shift
        seen[name] = ratio[0].detach()

    for name, module in gates(network.network).items():
        module.register_forward_hook(lambda module, args, out, name=name: see(name, module, args[0], out))
    found = explain_prediction(network, image_folder / "val" / "boot" / "00.png", None, top=2)
    assert found.gates.keys() == seen.keys() == gates(network.network).keys()
    for name, values in seen.items():
        torch.testing.assert_close(found.gates[name].float(), values, rtol=1e-3, atol=1e-4)
    assert (found.means, found.images, len(found.classes)) == (None, 0, 2)


def test_means_are_over_the_validation_images_of_the_predicted_class(image_folder: Path, pictures: ImageData) -> None:
    network = trained("se", [4, 8])
    found = explain_prediction(network, image_folder / "val" / "coat" / "03.png", pictures)
    folder = image_folder / "val" / found.classes[0]
    alone = [explain_prediction(network, file, None).gates for file in sorted(folder.iterdir())]
    assert found.images == len(alone) == 6
    for name, mean in (found.means or {}).items():
        torch.testing.assert_close(mean, torch.stack([each[name] for each in alone]).mean(0))
    assert sum(found.probabilities) == pytest.approx(1)
    assert found.probabilities == sorted(found.probabilities, reverse=True)


def test_images_of_other_classes_are_not_decoded(image_folder: Path, pictures: ImageData, monkeypatch) -> None:
    read = []
    own = type(pictures.splits.val).__getitem__
    monkeypatch.setattr(type(pictures.splits.val), "__getitem__", lambda self, i: read.append(i) or own(self, i))
    found = explain_prediction(trained("se", [4]), image_folder / "val" / "coat" / "03.png", pictures)
    assert len(read) == found.images == 6


def test_a_network_without_gates_a_missing_file_and_no_class_are_errors(image_folder: Path, tmp_path: Path) -> None:
    image = image_folder / "val" / "coat" / "03.png"
    with pytest.raises(ValueError, match="the network has no gates to explain"):
        explain_prediction(trained(None, [4]), image, None)
    with pytest.raises(FileNotFoundError, match="no such file"):
        explain_prediction(trained("eca", [4]), tmp_path / "none.png", None)
    with pytest.raises(ValueError, match="top must be 1 or more, got 0"):
        explain_prediction(trained("eca", [4]), image, None, top=0)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png"):
        explain_prediction(trained("eca", [4]), tmp_path / "text.png", None)
