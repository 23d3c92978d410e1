"""Weights made elsewhere: released checkpoints, plain networks' weights without a change of function, damaged files."""

import copy
import functools
import os
import pathlib

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from plain_networks import blocks, plain, randomise_, relative_difference, save_as_released, with_eca
from torch import nn

from ecanet.models import (
    ECAMobileNetV2,
    ECAResNet,
    build_model,
    eca_resnet18,
    load_official,
    load_plain_weights,
    read_state_dict,
    small_eca_resnet,
)
from ecanet.nn import ECA, GATES, SEVar1

# Both sides do the same float32 operations in nearly the same order.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}

BACKBONES = ["resnet18", "resnet50", "mobilenet_v2"]


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.fixture(scope="module")
def plain_network():
    """torchvision's network by name, with the norms of a trained one; do not change it."""

    @functools.cache
    def build(backbone: str) -> nn.Module:
        torch.manual_seed(1)
        return plain(backbone)

    return build


@pytest.fixture(scope="module")
def plain_outputs(plain_network):
    """The plain network's inputs and outputs in float32 and in float64."""

    @functools.cache
    def compute(backbone: str) -> dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]]:
        network = copy.deepcopy(plain_network(backbone))
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        with torch.no_grad():
            return {dtype: (x.to(dtype), network.to(dtype)(x.to(dtype))) for dtype in TOLERANCE}

    return compute


@pytest.fixture(scope="module")
def small_plain() -> dict[str, torch.Tensor]:
    """A small plain network's state dict."""
    torch.manual_seed(2)
    return randomise_(small_eca_resnet(None)).state_dict()


@pytest.fixture(scope="module")
def released18(tmp_path_factory) -> pathlib.Path:
    """A released ECA-ResNet-18."""
    torch.manual_seed(3)
    return save_as_released(
        with_eca("resnet18", num_classes=5), tmp_path_factory.mktemp("released") / "eca_resnet18_k3577.pth.tar"
    )


def changed(path: pathlib.Path, to: pathlib.Path, change) -> pathlib.Path:
    """A copy of a checkpoint with another state dict."""
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "state_dict": change(checkpoint["state_dict"])}, to)
    return to


# Released checkpoints


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "mobilenet_v2"])
def test_a_released_checkpoint_gives_the_network_it_was_saved_from(backbone, tmp_path):
    reference = with_eca(backbone)
    model = load_official(save_as_released(reference, tmp_path / "model_best.pth.tar"))
    assert model.backbone == backbone
    want_class = ECAMobileNetV2 if backbone == "mobilenet_v2" else ECAResNet
    assert type(model) is want_class
    assert model.training
    x = pictures()
    assert relative_difference(model.eval()(x), reference(x)) < TOLERANCE[torch.float32]
    released = build_model(f"eca_{backbone}", kernel_size="released")
    released.load_state_dict(model.state_dict())  # strict: the same keys and kernel sizes
    assert list(model.state_dict()) == list(released.state_dict())


def test_kernels_3557_load_into_eca_resnet50(tmp_path):
    reference = with_eca("resnet50", [3, 5, 5, 7], num_classes=10)
    model = load_official(save_as_released(reference, tmp_path / "eca_resnet50_k3557.pth.tar"))
    assert model.config["kernel_size"] == [3, 5, 5, 7]
    assert model.config["num_classes"] == 10
    assert sum(gate.conv.weight.numel() for _, gate in model.gated_norms()) == 80
    x = pictures()
    assert relative_difference(model.eval()(x), reference(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kernel_sizes", [[9, 1, 3, 5], [3, 3, 3, 3]])
def test_kernel_sizes_follow_from_the_file(kernel_sizes, tmp_path):
    reference = with_eca("resnet18", kernel_sizes, num_classes=5)
    model = load_official(save_as_released(reference, tmp_path / "k.pth.tar"))
    assert model.config["kernel_size"] == kernel_sizes


@pytest.mark.parametrize("prefix", ["module.", "", "module.module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(prefix, released18, tmp_path):
    def rename(state):
        return {prefix + key.removeprefix("module."): value for key, value in state.items()}

    got = read_state_dict(changed(released18, tmp_path / "renamed.pth.tar", rename))
    want = read_state_dict(released18)
    assert got.keys() == want.keys()
    assert "layer1.0.eca.conv.weight" in got


@pytest.mark.parametrize("form", ["old torch", "flat", "model", "safetensors", "without counters"])
def test_other_forms_of_a_checkpoint(form, released18, tmp_path):
    state = read_state_dict(released18)
    path = tmp_path / "weights.pth"
    if form == "old torch":  # the released files predate torch 1.6
        torch.save({"state_dict": state, "best_prec1": 77.42}, path, _use_new_zipfile_serialization=False)
    elif form == "flat":
        torch.save(state, path)
    elif form == "model":
        torch.save({"model": state, "epoch": 3}, path)
    elif form == "safetensors":
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(state, path)
    else:  # before torch 0.4.1
        torch.save({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, path)
    want = load_official(released18).eval()
    x = pictures()
    assert torch.equal(load_official(str(path)).eval()(x), want(x))


def test_missing_and_unexpected_keys_are_named(released18, tmp_path):
    def change(state):
        state["module.extra"] = torch.ones(1)
        state["module.conv1.weight"] = torch.ones(64, 1, 7, 7)
        return {key: value for key, value in state.items() if "bn1.bias" not in key or "layer" in key}

    path = changed(released18, tmp_path / "changed.pth.tar", change)
    message = (
        r"changed.pth.tar looks like resnet18, but 1 missing: bn1.bias; 1 unexpected: extra; "
        r"1 of another shape: conv1.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)"
    )
    with pytest.raises(ValueError, match=message + ": pass strict=False"):
        load_official(path)
    with pytest.warns(UserWarning, match=message):
        model = load_official(path, strict=False)
    want = load_official(released18).state_dict()
    got = model.state_dict()
    skipped = {"bn1.bias", "conv1.weight"}
    assert all(torch.equal(got[key], want[key]) for key in want.keys() - skipped)
    assert not any(torch.equal(got[key], want[key]) for key in skipped)


def test_a_stage_or_a_classifier_that_is_missing_is_named_too(released18, tmp_path):
    def change(state):
        return {key: value for key, value in state.items() if "layer2.0.eca" not in key and ".fc." not in key}

    path = changed(released18, tmp_path / "changed.pth.tar", change)
    with pytest.raises(ValueError, match=r"3 missing: layer2.0.eca.conv.weight, fc.weight, fc.bias"):
        load_official(path)

    def change_more(state):
        return {key: value for key, value in state.items() if "layer2" not in key or ".eca." not in key}

    path = changed(released18, tmp_path / "changed.pth.tar", change_more)
    with pytest.raises(ValueError, match=r"2 missing: layer2.0.eca.conv.weight, layer2.1.eca.conv.weight"):
        load_official(path)


def test_kernel_sizes_within_a_stage_must_agree(released18, tmp_path):
    def change(state):
        return {**state, "module.layer3.1.eca.conv.weight": torch.ones(1, 1, 3)}

    path = changed(released18, tmp_path / "changed.pth.tar", change)
    with pytest.raises(ValueError, match=r"kernel sizes \[3, 7\] within stage 3 of resnet18"):
        load_official(path)


def test_networks_that_were_not_released_are_refused(tmp_path):
    torch.save(small_eca_resnet().state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"not an ECA-ResNet-18, 34, .* basic blocks \[1, 1, 1, 0\] per stage"):
        load_official(tmp_path / "small.pth")


def test_plain_weights_are_refused_by_load_official(plain_network, tmp_path):
    torch.save(plain_network("resnet18").state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match=r"holds no ECA weights .* use ecanet.models.load_plain_weights"):
        load_official(tmp_path / "resnet18.pth")


# Files that are not checkpoints


class Code:
    """Runs when unpickled."""

    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("held", "name"),
    [
        (lambda: {"state_dict": {"fc.weight": torch.ones(1)}, "args": Code()}, r"posix\.system"),
        (lambda: torchvision.models.resnet18(), r"torchvision\.models\.resnet\.ResNet"),
        (lambda: {"fc.weight": torch.ones(1), "best": np.float64(1)}, r"numpy\._core\.multiarray\.scalar"),
    ],
    ids=["code", "module", "numpy"],
)
def test_a_pickle_with_code_is_refused(held, name, zipped, tmp_path):
    path = tmp_path / "code.pth.tar"
    torch.save(held(), path, _use_new_zipfile_serialization=zipped)
    for load in (load_official, lambda path: eca_resnet18(weights=path)):
        with pytest.raises(ValueError, match=rf"code.pth.tar was refused: it holds {name}.* Save the state dict alone"):
            load(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(kept, zipped, tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"state_dict": small_eca_resnet().state_dict()}, whole, _use_new_zipfile_serialization=zipped)
    content = whole.read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"cut.pth is not a checkpoint that .* can read, or it is damaged \(.+\)"):
        load_official(cut)


@pytest.mark.parametrize("name", ["notes.txt", "weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"hello, I am a text", b"{}", b"\xff\xd8\xff\xe0 a photograph", bytes(100)])
def test_a_wrong_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a checkpoint that torch or safetensors can read"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("held", "found"),
    [
        (torch.ones(3), "found Tensor"),
        ([torch.ones(3)], "found list"),
        ({}, "found nothing"),
        ({"state_dict": {}}, "found nothing"),
        ({"epoch": 3, "arch": "eca_resnet50"}, "found int at 'epoch'"),
        ({"a": torch.ones(1), "b": None}, "found NoneType at 'b'"),
        ({1: torch.ones(1)}, "found Tensor at 1"),
    ],
)
def test_a_file_without_a_state_dict_is_named(held, found, tmp_path):
    torch.save(held, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth holds no state dict: expected names mapped to tensors, {found}"):
        read_state_dict(tmp_path / "other.pth")


@pytest.mark.parametrize("load", [load_official, read_state_dict, lambda path: eca_resnet18(weights=path)])
def test_a_file_that_is_not_there(load, tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}"):
            load(path)


# Plain weights, without a change of function


def possible(backbone: str) -> list[str]:
    # SE-Var1 cannot be neutral; SE-GC1 and 2 need multiples of 16 channels and MobileNetV2 has 24.
    impossible = {"se_var1", "gct_gauss", "simam"} | ({"se_gc1", "se_gc2"} if backbone == "mobilenet_v2" else set())
    return [gate for gate in GATES if gate not in impossible]


@pytest.mark.parametrize(
    ("backbone", "gate"), [(backbone, gate) for backbone in BACKBONES for gate in [None, *possible(backbone)]], ids=str
)
def test_plain_weights_keep_the_function(backbone, gate, plain_network, plain_outputs):
    model = build_model(f"eca_{backbone}", gate=gate, weights=plain_network(backbone).state_dict()).eval()
    for dtype, (x, want) in plain_outputs(backbone).items():
        with torch.no_grad():
            assert relative_difference(model.to(dtype)(x), want) < TOLERANCE[dtype], dtype


def test_plain_weights_keep_the_function_while_training(plain_network):
    reference = plain_network("resnet18")
    model = eca_resnet18(weights=reference.state_dict()).train()
    x = pictures()
    want = torchvision.models.resnet18()
    want.load_state_dict(reference.state_dict())
    assert relative_difference(model(x), want.train()(x)) < TOLERANCE[torch.float32]
    torch.testing.assert_close(model.layer4[1].bn2.running_mean, want.layer4[1].bn2.running_mean)


@pytest.mark.parametrize("gate", possible("small_resnet"))
def test_gradients_reach_every_gate_after_the_load(gate):
    widths = (128, 256)  # so that SE's hidden layers are wide enough to be alive
    state = randomise_(small_eca_resnet(None, widths=widths)).state_dict()
    model = small_eca_resnet(gate, widths=widths, weights=state)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def untouched() -> list[str]:
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).logsumexp(1).sum().backward()
        return [
            name
            for i, (_, gate) in enumerate(model.gated_norms())
            for name in [f"{i}.{name}" for name, p in gate.named_parameters() if not p.grad.any()]
        ]

    first = untouched()
    # What is behind a 0, such as W1 behind SE's W2 = 0, waits for one step.
    behind = {"se": ["fc1.weight"], "se_shift": ["fc1.weight", "fc1.bias"], "srm": ["bn.weight"], "gct": ["alpha"]}
    behind["cbam"] = ["channel.fc1.weight", "spatial.conv.conv.weight"]
    assert first == [f"{i}.{name}" for i in range(2) for name in behind.get(gate, [])]
    optimizer.step()
    assert untouched() == []


@pytest.mark.parametrize("kind", ["pth", "released form", "safetensors", "pathlib"])
def test_plain_weights_from_a_file(kind, small_plain, tmp_path):
    path = tmp_path / ("plain.safetensors" if kind == "safetensors" else "plain.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(small_plain, path)
    elif kind == "released form":
        torch.save({"state_dict": {f"module.{key}": value for key, value in small_plain.items()}}, path)
    else:
        torch.save(small_plain, path)
    model = small_eca_resnet(weights=path if kind == "pathlib" else str(path)).eval()
    reference = small_eca_resnet(None).eval()
    reference.load_state_dict(small_plain)
    x = torch.randn(2, 3, 28, 28)
    assert relative_difference(model(x), reference(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "weights", ["IMAGENET1K_V1", "DEFAULT", torchvision.models.ResNet18_Weights.IMAGENET1K_V1], ids=str
)
def test_plain_weights_by_torchvisions_name(weights, plain_network, tmp_path, monkeypatch):
    # torchvision looks here before it downloads.
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    reference = plain_network("resnet18")
    file = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(reference.state_dict(), tmp_path / "checkpoints" / file)
    x = pictures()
    assert relative_difference(eca_resnet18(weights=weights).eval()(x), reference(x)) < TOLERANCE[torch.float32]


def test_loading_twice_is_loading_once(small_plain):
    once = small_eca_resnet(weights=small_plain)
    twice = load_plain_weights(load_plain_weights(small_eca_resnet(neutral=True), small_plain), small_plain)
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in twice.state_dict().items())


def test_load_plain_weights_returns_the_model(small_plain):
    model = small_eca_resnet()
    assert load_plain_weights(model, small_plain) is model


# The classifier


@pytest.mark.parametrize("name", ["eca_resnet18", "eca_mobilenet_v2"])
def test_another_number_of_classes_keeps_the_new_classifier(name, plain_network):
    reference = plain_network(name.removeprefix("eca_"))
    torch.manual_seed(7)
    fresh = build_model(name, num_classes=7).state_dict()
    torch.manual_seed(7)
    model = build_model(name, num_classes=7, weights=reference.state_dict())
    head = model.classifier_name
    assert torch.equal(model.state_dict()[f"{head}.weight"], fresh[f"{head}.weight"])
    assert torch.equal(model.state_dict()[f"{head}.bias"], fresh[f"{head}.bias"])
    x = pictures()
    for network in (model, reference := torchvision.models.get_model(model.backbone)):
        setattr(network, head.split(".")[0], nn.Identity())
    reference.load_state_dict(plain_network(model.backbone).state_dict(), strict=False)
    assert relative_difference(model.eval()(x), reference.eval()(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "head", [nn.Identity(), nn.Sequential(nn.Dropout(), nn.Linear(128, 10))], ids=["none", "sequence"]
)
def test_a_classifier_of_another_kind_is_kept(head, small_plain):
    model = small_eca_resnet()
    model.fc = head
    before = {key: value.clone() for key, value in head.state_dict().items()}
    load_plain_weights(model, small_plain)
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    assert torch.equal(model.conv1.weight, small_plain["conv1.weight"])


# What cannot be loaded, or not without a change of function


def assert_refused_and_unchanged(model: nn.Module, weights, message: str, fold: bool = False) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_plain_weights(model, weights, fold=fold)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_gate_that_cannot_be_neutral_leaves_the_network_unchanged(small_plain):
    assert_refused_and_unchanged(small_eca_resnet("se_var1"), small_plain, "SEVar1 cannot be made neutral")


def test_one_gate_that_cannot_be_neutral_leaves_the_others_unchanged(small_plain):
    def gate(channels):
        return SEVar1(channels) if channels == 128 else ECA(channels)

    assert_refused_and_unchanged(small_eca_resnet(gate), small_plain, "SEVar1 cannot be made neutral")


def test_a_gate_without_make_neutral_is_refused(small_plain):
    model = small_eca_resnet(lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.Sigmoid()))
    assert_refused_and_unchanged(model, small_plain, r"gate Sequential has no make_neutral_\(\)")


def test_a_norm_without_weight_and_bias_can_take_no_factor_and_need_not():
    build = functools.partial(eca_resnet18, norm_layer=nn.InstanceNorm2d)
    plain = build(None).eval()
    model = build(weights=plain.state_dict()).eval()
    x = pictures()
    assert torch.equal(model(x), plain(x))
    message = r"layer1\.0\.eca cannot be folded.*InstanceNorm2d is not a norm with a plain weight and bias"
    assert_refused_and_unchanged(build(), plain.state_dict(), message, fold=True)
    with pytest.raises(ValueError, match=message):
        build(neutral=True, fold=True)


@pytest.mark.parametrize("gate", ["eca", "se", None], ids=str)
def test_official_weights_are_refused_by_load_plain_weights(gate, released18):
    model = eca_resnet18(gate, num_classes=5)
    assert_refused_and_unchanged(model, released18, "already have gates.* ecanet.models.load_official")


def test_weights_of_other_gates_are_refused():
    model = small_eca_resnet("se")
    assert_refused_and_unchanged(model, small_eca_resnet("se").state_dict(), "weights already have gates")


def test_weights_of_another_network_are_refused(small_plain, plain_network):
    assert_refused_and_unchanged(
        small_eca_resnet(widths=(32, 64)), small_plain, "do not fit small_resnet: 18 unexpected: layer3.0.conv1.weight"
    )
    assert_refused_and_unchanged(
        small_eca_resnet(widths=(32, 64, 96)), small_plain, r"layer3.0.conv1.weight \(128, 64, 3, 3\) instead of \(96"
    )
    assert_refused_and_unchanged(
        small_eca_resnet(blocks=2), small_plain, "missing: layer1.1.conv1.weight, layer1.1.bn1.weight"
    )
    assert_refused_and_unchanged(
        eca_resnet18(),
        plain_network("mobilenet_v2").state_dict(),
        r"100 missing: conv1.weight, .* and 80 more; 314 un",
    )


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("eca_resnet18", "IMAGENET1K_V9", "neither a file nor a name of .*for resnet18: IMAGENET1K_V1$"),
        ("eca_resnet50", "imagenet", "for resnet50: IMAGENET1K_V1, IMAGENET1K_V2$"),
        ("small_eca_resnet", "DEFAULT", "for small_resnet: there are none$"),
        ("small_eca_resnet", {}, "weights holds no state dict: .* found nothing"),
        ("small_eca_resnet", {"epoch": 3}, "weights holds no state dict: .* found int at 'epoch'"),
    ],
)
def test_wrong_weights_are_named(name, weights, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model(name, weights=weights)


def test_a_checkpoint_that_was_read_already_is_as_good(small_plain):
    model = small_eca_resnet(weights={"state_dict": {f"module.{key}": v for key, v in small_plain.items()}, "epoch": 3})
    assert torch.equal(model.conv1.weight, small_plain["conv1.weight"])


def test_every_block_of_the_reference_has_its_layer():
    # What the comparisons above rest on.
    model = with_eca("resnet18")
    assert all(hasattr(block, "eca") for _, block in blocks(model))
    x = pictures()
    before = model(x)
    for _, block in blocks(model):
        nn.init.constant_(block.eca.conv.weight, 100)
    assert relative_difference(model(x), before) > 0.1
