"""Features for dense tasks: torchvision's two ways to take them out of every network."""

import pytest
import torch
from plain_networks import randomise_
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

from ecanet.models import MODELS, build_model, eca_mobilenet_v2, eca_resnet18, eca_resnet50, small_eca_resnet
from ecanet.nn import SE

STAGES = ["layer1", "layer2", "layer3", "layer4"]
# Ends of the resolutions 1/4, 1/8, 1/16 and 1/32.
BLOCKS = ["features.3", "features.6", "features.13", "features.17"]
# What torchvision takes out is computed by the modules, the network itself runs the fused tail; float32.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
GATES = [None, "eca", "eca_ns", "se", "se_var1", "se_gc3", lambda channels: SE(channels, 4)]


def outputs(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """Outputs of submodules in a forward pass of the whole network."""
    kept: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: kept.update({name: out.clone()}))
        for name in names
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return kept


def assert_equal_and_differentiable(features: dict[str, Tensor], want: dict[str, Tensor], model: nn.Module) -> None:
    assert list(features) == list(want)
    for name in want:
        torch.testing.assert_close(features[name], want[name], **TOLERANCE, msg=name)
    sum(x.square().mean() for x in features.values()).backward()
    assert next(model.parameters()).grad.any()
    for i, (_, gate) in enumerate(model.gated_norms()):
        assert all(p.grad is not None for p in gate.parameters()), f"gate {i}"


@pytest.mark.parametrize(
    ("build", "names", "gate"),
    [
        *((small_eca_resnet, STAGES[:3], gate) for gate in GATES),
        *((eca_resnet18, STAGES, gate) for gate in (None, "eca", "se")),
        *((eca_mobilenet_v2, BLOCKS, gate) for gate in (None, "eca", "se")),
    ],
    ids=lambda part: part.__name__ if callable(part) else "" if isinstance(part, list) else str(part),
)
def test_feature_extraction(build, names, gate):
    model = randomise_(build(gate))
    x = torch.randn(2, 3, 64, 64)
    extractor = create_feature_extractor(model, return_nodes={name: name for name in names})
    assert_equal_and_differentiable(extractor(x), outputs(model, names, x), model)


@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
@pytest.mark.parametrize("build", [eca_resnet18, small_eca_resnet], ids=["resnet18", "small"])
def test_intermediate_layer_getter(build, gate):
    model = randomise_(build(gate))
    x = torch.randn(2, 3, 64, 64)
    names = list(model.stage_names)
    getter = IntermediateLayerGetter(model, {name: name for name in names})
    assert_equal_and_differentiable(getter(x), outputs(model, names, x), model)


def test_intermediate_layer_getter_of_mobilenet():
    model = randomise_(eca_mobilenet_v2())
    x = torch.randn(2, 3, 64, 64)
    getter = IntermediateLayerGetter(model.features, {name.split(".")[1]: name for name in BLOCKS})
    assert_equal_and_differentiable(getter(x), outputs(model, BLOCKS, x), model)


def test_a_gate_in_the_middle_can_be_taken_out_too():
    model = randomise_(eca_resnet18())
    x = torch.randn(2, 3, 64, 64)
    names = ["layer2.0.bn2", "layer2.0.eca", "layer2.0"]
    got = create_feature_extractor(model, return_nodes={name: name for name in names})(x)
    want = outputs(model, names, x)
    for name in ("layer2.0.eca", "layer2.0"):
        torch.testing.assert_close(got[name], want[name], **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("eca_resnet101", "eca_resnet152")])
def test_every_network_can_be_traced(name):
    last = {"eca_mobilenet_v2": "features.17", "small_eca_resnet": "layer3"}.get(name, "layer4")
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
        features = create_feature_extractor(model, return_nodes={last: "last"})(torch.empty(1, 3, 64, 64))
    want = {"eca_resnet18": 512, "eca_resnet34": 512, "eca_mobilenet_v2": 320, "small_eca_resnet": 128}
    assert features["last"].shape[1] == want.get(name, 2048)


def test_dilation_keeps_the_resolution():
    with torch.device("meta"):
        model = eca_resnet50(replace_stride_with_dilation=[False, True, True])
        features = IntermediateLayerGetter(model, {"layer4": "last"})(torch.empty(1, 3, 64, 64))
    assert features["last"].shape == (1, 2048, 8, 8)
