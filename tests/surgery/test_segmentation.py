"""Gates in segmentation networks: encoders, decoders, whole networks of segmentation_models.pytorch; plain U-Nets."""

import copy
from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecanet import insert_gates_, remove_gates_, replace_gates_

# --- plain U-Nets -------------------------------------------------------------------------------------------------


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class PlainUNet(nn.Module):
    """The U-Net that most people write: pairs of convolutions, max pooling, transposed convolutions."""

    def __init__(self, block: Callable[[int, int], nn.Module] = double_conv) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 8), block(8, 16), block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.join2, self.join1 = block(32, 16), block(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        up = self.join2(torch.cat([two, self.up2(self.bottom(F.max_pool2d(two, 2)))], 1))
        return self.head(self.join1(torch.cat([one, self.up1(up)], 1)))


class FunctionalConvs(nn.Module):
    """Two convolutions with norms, and activations that are functions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))), 0.1)


# --- what has to hold ---------------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "Unet-resnet18": lambda: smp.Unet("resnet18", encoder_weights=None),
    "Unet-resnet18-scse": lambda: smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="scse"),
    "Unet-mobilenet_v2": lambda: smp.Unet("mobilenet_v2", encoder_weights=None),
    "Unet-efficientnet": lambda: smp.Unet("efficientnet-b0", encoder_weights=None),
    "Unet-timm-regnet": lambda: smp.Unet("tu-regnetx_002", encoder_weights=None),
    "UnetPlusPlus": lambda: smp.UnetPlusPlus("resnet18", encoder_weights=None),
    "FPN": lambda: smp.FPN("resnet18", encoder_weights=None),
    "DeepLabV3Plus": lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None),
    "plain": PlainUNet,
    "plain-functional": lambda: PlainUNet(FunctionalConvs),
}
# Network, the part that gates go into, where, how many, in what precision.
CASES = [
    ("Unet-resnet18", "encoder", "block", 8, torch.float32),
    ("Unet-resnet18", "decoder", "conv", 10, torch.float64),
    ("Unet-resnet18", "", "conv", 19, torch.float32),
    ("Unet-resnet18-scse", "decoder", "conv", 10, torch.float64),
    ("Unet-mobilenet_v2", "encoder", "block", 17, torch.float32),
    ("Unet-mobilenet_v2", "decoder", "conv", 10, torch.float64),
    ("Unet-efficientnet", "encoder", "block", 16, torch.float32),
    ("Unet-timm-regnet", "encoder", "block", 13, torch.float32),
    ("Unet-timm-regnet", "", "conv", 37, torch.float32),
    ("UnetPlusPlus", "decoder", "conv", 22, torch.float32),
    ("FPN", "", "block", 8, torch.float32),
    ("FPN", "decoder", "conv", 7, torch.float32),
    ("DeepLabV3Plus", "encoder", "block", 8, torch.float32),
    ("DeepLabV3Plus", "decoder", "conv", 8, torch.float32),
    ("plain", "", "conv", 10, torch.float64),
    ("plain-functional", "", "conv", 10, torch.float64),
]
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}  # of the largest output


def varied(name: str, dtype: torch.dtype) -> nn.Module:
    """A network whose norms do something: weights, biases and statistics as after training."""
    model = NETWORKS[name]().to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("name", "part", "where", "count", "dtype"), CASES, ids=lambda value: str(value) or "whole")
def test_gates_go_in_and_come_out(name: str, part: str, where: str, count: int, dtype: torch.dtype) -> None:
    model = varied(name, dtype)
    target = model.get_submodule(part)
    x = torch.randn(1, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        before = model(x)
    original = copy.deepcopy(model.state_dict())

    report = insert_gates_(target, where=where, input_shape=(1, 3, 64, 64))
    assert len(report.rows) == count
    with torch.no_grad():
        assert distance(model(x), before) < TOLERANCES[dtype]

    out = model(x)
    (out * torch.randn_like(out)).sum().backward()
    for row in report.rows:
        for parameter in target.get_submodule(row.name).parameters():
            assert parameter.grad is not None, row.name
            assert parameter.grad.abs().sum() > 0, row.name

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.load_state_dict(copy.deepcopy(original), strict=True)
    with torch.no_grad():
        assert distance(model(x), before) < TOLERANCES[dtype]

    remove_gates_(target)
    assert list(model.state_dict()) == list(original)
    with torch.no_grad():
        assert torch.equal(model(x), before)


# --- where gates go -----------------------------------------------------------------------------------------------


def places(model: nn.Module, where: str = "conv", shape: tuple[int, ...] | None = None) -> dict[str, int | None]:
    return {row.where: row.channels for row in insert_gates_(model, where=where, input_shape=shape).rows}


def test_a_part_that_takes_no_single_tensor_tells_its_channels_by_its_convolutions() -> None:
    decoder = smp.Unet("resnet18", encoder_weights=None).decoder
    found = places(decoder)
    assert list(found.values()) == [256, 256, 128, 128, 64, 64, 32, 32, 16, 16]
    assert list(found)[:2] == ["blocks.0.conv1.2", "blocks.0.conv2.2"]


def test_no_gate_goes_into_attention_of_decoders_and_it_can_be_swapped() -> None:
    model = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="scse").eval()
    assert not [name for name in places(model) if "attention" in name]
    remove_gates_(model)
    report = replace_gates_(model, "eca", input_shape=(1, 3, 64, 64))
    assert len(report.rows) == 10
    assert report.rows[-1].name == "decoder.blocks.4.attention2.attention"
    assert report.rows[-1].channels == 16
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_separable_convolutions_count_and_pooled_features_do_not() -> None:
    found = places(smp.DeepLabV3Plus("resnet18", encoder_weights=None).decoder)
    assert [name for name in found if name.startswith("aspp.0.convs")] == [f"aspp.0.convs.{i}.2" for i in range(4)]
    assert {"aspp.3", "block2.2"} <= set(found)
    assert not [name for name in found if name.startswith("aspp.0.convs.4")], "ASPP's branch of pooled features"


def test_squeeze_and_excitation_that_is_a_plain_sequence_gets_none() -> None:
    found = places(smp.MAnet("resnet18", encoder_weights=None).decoder)
    assert len(found) == 18
    assert not [name for name in found if "SE_" in name]


def test_plain_unet_gets_gates_after_activations_and_functional_ones_after_norms() -> None:
    assert list(places(PlainUNet()))[:3] == ["down1.2", "down1.5", "down2.2"]
    assert list(places(PlainUNet(FunctionalConvs)))[:3] == ["down1.norm1", "down1.norm2", "down2.norm1"]


def test_attention_at_the_end_of_a_sequence_is_the_attention_of_its_block() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("hgnet_tiny")
    with pytest.raises(ValueError, match=r"has attention there, .*aggregation.* \(EseModule\): replace_gates_ swaps"):
        insert_gates_(model)
