"""The networks as timm's: everything a user of timm.create_model expects."""

import pytest
import torch
from plain_networks import plain, randomise_, relative_difference, save_as_released, with_eca
from torch import nn

from ecanet.models import build_model
from ecanet.nn import ECA, SE

timm = pytest.importorskip("timm")

NAMES = ["eca_resnet18", "eca_resnet34", "eca_resnet50", "eca_resnet101", "eca_resnet152", "eca_mobilenet_v2"]
SMALLEST = ["eca_resnet18", "eca_mobilenet_v2"]  # one of each family, for what runs
CHANNELS = {
    "eca_resnet18": [64, 64, 128, 256, 512],
    "eca_resnet50": [64, 256, 512, 1024, 2048],
    "eca_mobilenet_v2": [16, 24, 32, 96, 320],
}
FEATURES = {"eca_resnet18": 512, "eca_mobilenet_v2": 1280}

smallest = pytest.mark.parametrize("name", SMALLEST)


def pictures(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 64, 64)


def create(name: str, **kwargs) -> nn.Module:
    return randomise_(timm.create_model(name, **kwargs))


def gates(model: nn.Module) -> list[nn.Module]:
    return [gate for _, gate in model.gated_norms()]


# The registry


def test_timm_lists_them_and_nothing_of_its_own_is_overwritten():
    assert set(NAMES) <= set(timm.list_models("eca_*"))
    assert {"eca_resnet33ts", "ecaresnet50d"} <= set(timm.list_models("*eca*"))
    assert timm.list_models(module="timm_models") == sorted(NAMES, key=NAMES[-1:].__contains__, reverse=True)
    assert not set(NAMES) & set(timm.list_pretrained("eca_*"))


@pytest.mark.parametrize(("name", "tag"), [*((name, ".ecanet") for name in NAMES), ("eca_resnet18", "")])
def test_keys_and_shapes_are_the_librarys(name, tag):
    with torch.device("meta"):
        model, ours = timm.create_model(name + tag), build_model(name)
    assert isinstance(model, type(ours))
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [(k, v.shape) for k, v in ours.state_dict().items()]
    assert model.default_cfg["architecture"] == name
    assert model.default_cfg["tag"] == "ecanet"
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 3
    assert model.get_submodule(model.default_cfg["classifier"]).out_features == 1000


@smallest
def test_it_computes_what_the_librarys_network_computes(name):
    model, ours = create(name), build_model(name).eval()
    ours.load_state_dict(model.state_dict())
    x = pictures()
    assert relative_difference(model(x), ours(x)) < 1e-6


@smallest
def test_the_preprocessing_is_that_of_imagenet(name):
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert config["crop_pct"] == 0.875


# The arguments of this library


@pytest.mark.parametrize(
    ("kwargs", "kind"), [({"gate": "se"}, SE), ({"gate": ECA}, ECA), ({"kernel_size": 9}, ECA), ({}, ECA)], ids=str
)
@smallest
def test_gates(name, kwargs, kind):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    assert {type(gate) for gate in gates(model)} == {kind}
    if "kernel_size" in kwargs:
        assert {gate.kernel_size for gate in gates(model)} == {9}


def test_no_gate_is_spelt_none():
    with torch.device("meta"):
        assert gates(timm.create_model("eca_resnet18", gate="none")) == []


def test_kernel_sizes():
    with torch.device("meta"):
        released = timm.create_model("eca_resnet50", kernel_size="released")
        listed = timm.create_model("eca_resnet18", kernel_size=[1, 3, 5, 7])
    assert sum(gate.conv.weight.numel() for gate in gates(released)) == 80
    assert [gate.kernel_size for gate in gates(listed)] == [1, 1, 3, 3, 5, 5, 7, 7]


# The head


@smallest
def test_number_of_classes(name):
    x = pictures()
    model = create(name, num_classes=10)
    assert model(x).shape == (2, 10)
    assert model.num_classes == 10
    headless = create(name, num_classes=0)
    assert headless(x).shape == (2, FEATURES[name])
    assert isinstance(headless.get_classifier(), nn.Identity)
    assert create(name, num_classes=0, global_pool="")(x).shape == (2, FEATURES[name], 2, 2)


@smallest
def test_forward_in_parts(name):
    model = create(name, num_classes=10)
    x = pictures()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(model.get_classifier()(pooled), model(x))
    assert torch.equal(model.forward_head(features), model(x))


@smallest
def test_reset_classifier(name):
    model = create(name).train()
    model.get_submodule("bn1" if name == "eca_resnet18" else "features.0.1").eval()  # stays frozen
    model.double().reset_classifier(7)
    classifier = model.get_classifier()
    assert classifier is model.get_submodule(model.get_classifier(name_only=True))
    assert (classifier.out_features, classifier.weight.dtype, model.num_classes) == (7, torch.float64, 7)
    assert len([module for module in model.modules() if not module.training]) == 1
    model.reset_classifier(0, "max")
    x = pictures().double()
    features = model.eval().forward_features(x)
    torch.testing.assert_close(model(x), features.amax((2, 3)))
    model.reset_classifier(3, "catavgmax")
    assert model.head_hidden_size == 2 * model.num_features
    assert model(x).shape == (2, 3)
    model.reset_classifier(5)  # keeps the pooling
    assert model.get_classifier().in_features == 2 * model.num_features


@smallest
def test_dropout(name):
    model = create(name, drop_rate=0.9)
    features = model.forward_features(pictures())
    whole = model.forward_head(features, pre_logits=True)
    dropped = model.train().forward_head(features, pre_logits=True)
    assert 0.7 < (dropped[whole != 0] == 0).float().mean() < 1
    assert timm.create_model(name, drop_rate=0.9).config["drop_rate"] == 0.9


@pytest.mark.parametrize("channels", [1, 4])
@smallest
def test_number_of_input_channels(name, channels):
    model = create(name, in_chans=channels, num_classes=10)
    assert model(pictures(channels)).shape == (2, 10)
    stem = model.get_submodule(model.default_cfg["first_conv"])
    assert stem.weight.shape[1] == stem.in_channels == channels
    assert stem.weight.std() > 0.01


# Feature maps


@pytest.mark.parametrize("feature_cls", [None, "dict", "hook", "fx", "getter"])
@smallest
def test_features_only(name, feature_cls):
    torch.manual_seed(3)
    backbone = timm.create_model(name, features_only=True, gate="se", feature_cls=feature_cls).eval()
    torch.manual_seed(3)
    whole = timm.create_model(name, gate="se").eval()
    x = pictures()
    got = backbone(x)
    got = list(got.values()) if isinstance(got, dict) else got
    want = whole.forward_intermediates(x, intermediates_only=True)
    assert backbone.feature_info.channels() == [y.shape[1] for y in want] == CHANNELS[name]
    assert backbone.feature_info.reduction() == [64 // y.shape[-1] for y in want] == [2, 4, 8, 16, 32]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("out_indices", "maps"), [((1, 4), [1, 4]), ((-1,), [4]), ((0, -2), [0, 3]), ((2, 3), [2, 3])])
@smallest
def test_out_indices(name, out_indices, maps):
    backbone = timm.create_model(name, features_only=True, out_indices=out_indices)
    assert [y.shape[1] for y in backbone(pictures())] == [CHANNELS[name][i] for i in maps]


def test_features_of_a_bottleneck_network():
    backbone = timm.create_model("eca_resnet50.ecanet", features_only=True)
    assert [y.shape[1] for y in backbone(pictures())] == backbone.feature_info.channels() == CHANNELS["eca_resnet50"]


@smallest
def test_forward_intermediates(name):
    model = create(name)
    x = pictures()
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert len(maps) == 5
    for indices, want in [(2, [3, 4]), ([1, -1], [1, 4]), ([0], [0])]:
        got = model.forward_intermediates(x, indices, intermediates_only=True)
        assert all(torch.equal(a, maps[i]) for a, i in zip(got, want, strict=True))
    stopped, (only,) = model.forward_intermediates(x, [2], stop_early=True)
    assert torch.equal(stopped, maps[2])
    assert torch.equal(only, maps[2])


@pytest.mark.parametrize(("output_stride", "reductions"), [(8, [2, 4, 8, 8, 8]), (16, [2, 4, 8, 16, 16])])
def test_output_stride(output_stride, reductions):
    with torch.device("meta"):
        backbone = timm.create_model("eca_resnet50", features_only=True, output_stride=output_stride)
        sizes = [y.shape[-1] for y in backbone(pictures())]
    assert backbone.feature_info.reduction() == reductions == [64 // size for size in sizes]


# Training and compiling


@smallest
def test_gradient_checkpointing_changes_nothing(name):
    gradients = []
    x = pictures()
    for enable in (False, True):
        torch.manual_seed(4)
        model = create(name, num_classes=10, drop_rate=0.0)
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_without_a_graph_break():
    model = create("eca_resnet18", num_classes=10)
    x = pictures()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


# Weights


def test_pretrained_says_where_weights_are():
    for name in (*NAMES, "eca_resnet50.ecanet"):
        with torch.device("meta"), pytest.raises(ValueError, match=r"pretrained=True finds no weights.*load_official"):
            timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("num_classes", [1000, 10, 0])
def test_a_released_file_through_timm(num_classes, tmp_path):
    reference = with_eca("resnet18")
    path = save_as_released(reference, tmp_path / "eca_resnet18_k3577.pth.tar")
    model = timm.create_model(
        "eca_resnet18",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        kernel_size="released",
        num_classes=num_classes,
    ).eval()
    x = pictures()
    if num_classes == 1000:
        assert relative_difference(model(x), reference(x)) < 1e-5
    want = reference.state_dict()
    got = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(value, want[key]) for key, value in got.items())


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 0}, {"features_only": True}], ids=str)
@smallest
def test_plain_weights_through_timm(name, kwargs):
    reference = plain(name.removeprefix("eca_"))
    model = timm.create_model(name, weights=reference.state_dict(), **kwargs).eval()
    x = pictures()
    if kwargs:
        stages = reference.layer4 if name == "eca_resnet18" else reference.features[17]
        kept = []
        stages.register_forward_hook(lambda _, __, out: kept.append(out))
        reference(x)
        got = model(x)[-1] if "features_only" in kwargs else model.forward_intermediates(x, 1)[1][0]
        assert relative_difference(got, kept[0]) < 1e-5
    else:
        assert relative_difference(model(x), reference(x)) < 1e-5


@smallest
def test_timms_own_way_to_save(name, tmp_path):
    model = create(name, num_classes=10, gate="se")
    timm.models.save_for_hf(model, tmp_path, model_args={"gate": "se"})
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = pictures()
    assert torch.equal(back(x), model(x))


@smallest
def test_save_pretrained_after_reset_classifier(name, tmp_path):
    model = create(name, num_classes=10, in_chans=1, drop_rate=0.3, kernel_size="released")
    model.reset_classifier(3, "max")
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert back.config == model.config
    x = pictures(1)
    assert torch.equal(back(x), model(x))


# Mistakes


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("eca_resnet18", {"gate": "ecaa"}, ValueError, "gate must be one of"),
        ("eca_resnet50", {"output_stride": 4}, ValueError, "output_stride must be 8, 16 or 32, got 4"),
        ("eca_resnet18", {"output_stride": 16}, ValueError, "output_stride must be 32 for depth 18, got 16"),
        ("eca_mobilenet_v2", {"output_stride": 16}, TypeError, "output_stride"),
        ("eca_resnet18", {"drop_path_rate": 0.1}, TypeError, "drop_path_rate"),
    ],
)
def test_mistakes_are_named(name, kwargs, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        timm.create_model(name, **kwargs)


def test_wrong_feature_maps_are_named():
    with torch.device("meta"):
        model = timm.create_model("eca_resnet18")
        for indices in (6, 0, [5], [-6], []):
            with pytest.raises(ValueError, match="indices must name some of the 5 feature maps, 0 to 4, got"):
                model.forward_intermediates(pictures(), indices)
        with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
            model.forward_intermediates(pictures(), output_fmt="NLC")
