"""fuse_tails_: other people's blocks on the fused tail, with the same values, gradients, statistics and keys."""

import copy

import pytest
import timm
import torch
import torchvision
from networks import build, images, randomise_, relative_difference
from torch import nn

import ecanet
from ecanet import fuse_tails_, insert_gates_, remove_gates_
from ecanet.nn.norms import qualified_name
from ecanet.nn.tail import eager
from ecanet.surgery import FUSED
from tests.kernels_here import needs_kernels

NETWORKS = {
    "narrow/resnet18": 8,
    "narrow/resnet50": 16,
    "torchvision/mobilenet_v2": 17,
    "torchvision/mobilenet_v3_small": 11,
    "torchvision/efficientnet_b0": 16,
    "torchvision/efficientnet_v2_s": 40,
    "torchvision/regnet_x_400mf": 22,
    "timm/resnet10t": 4,
    "timm/resnet26d": 8,
    "timm/seresnet18": 8,
    "timm/ecaresnet26t": 8,
    "timm/ecaresnet50d": 16,
    "timm/regnety_002": 13,
    "timm/mobilenetv3_small_050": 11,
    "timm/tf_efficientnetv2_b0": 20,
}


def assert_trains_the_same(model: nn.Module, twin: nn.Module, tolerance: float = 1e-10) -> None:
    """Output, every gradient, every running statistic, in float64 and training mode."""
    x = images(40, batch=4, dtype=torch.float64)  # the smallest whose last maps have 2 x 2 pixels
    outputs = []
    for network in (model, twin):
        network.double().train()
        torch.manual_seed(1)
        outputs.append(network(x))
        outputs[-1].square().sum().backward()
    assert relative_difference(outputs[1], outputs[0]) < tolerance
    theirs = dict(model.named_parameters())
    largest = max(p.grad.abs().max().item() for p in theirs.values())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-7, atol=1e-11 * largest, msg=name)
    for (name, buffer), want in zip(twin.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(buffer, want, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_as_before(name) -> None:
    model = build(name)
    twin = copy.deepcopy(model)
    report = fuse_tails_(twin)
    assert len(report.rows) == NETWORKS[name]
    assert list(twin.state_dict()) == list(model.state_dict())
    assert_trains_the_same(model, twin)


@pytest.mark.parametrize("name", ["narrow/resnet18", "torchvision/mobilenet_v2", "timm/resnet10t", "timm/regnety_002"])
@pytest.mark.parametrize("first", ["gates", "tails"])
def test_gates_that_were_put_in_ride_along(name, first) -> None:
    model = build(name)
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    insert_gates_(model, preserve=False)
    torch.manual_seed(0)
    if first == "tails":
        fuse_tails_(twin)
    inserted = insert_gates_(twin, preserve=False)
    if first == "gates":
        report = fuse_tails_(twin)
        assert [row.gate for row in report.rows] == ["ECA"] * len(report.rows)
        assert [row.where for row in report.rows] == [row.where for row in inserted.rows]
    assert_trains_the_same(model, twin)


def test_gates_come_out_of_fused_blocks() -> None:
    model, x = build("narrow/resnet18"), images()
    state, before = copy.deepcopy(model.state_dict()), model(x)
    fuse_tails_(model)
    insert_gates_(model)
    remove_gates_(model)
    assert list(model.state_dict()) == list(state)
    assert relative_difference(model(x), before) < 1e-6


@needs_kernels
@pytest.mark.parametrize(("name", "tails"), [("narrow/resnet18", 8), ("timm/ecaresnet26t", 8), ("timm/seresnet18", 8)])
def test_the_kernels_run_norm_gate_and_addition_as_one(name, tails, monkeypatch) -> None:
    model = build(name).train()
    if name.startswith("narrow"):
        insert_gates_(model)
    fuse_tails_(model)
    seen = []
    compute = eager.norm_gate_add_act

    def see(backend, x, norm, gate, residual, act):
        seen.append((norm is not None, gate is not None, residual is not None))
        return compute(backend, x, norm, gate, residual, act)

    monkeypatch.setattr(eager, "norm_gate_add_act", see)
    model(images())
    assert seen.count((True, True, True)) == tails


def test_checkpoints_of_timm_load_before_and_after() -> None:
    model = build("timm/ecaresnet26t")
    state, x = copy.deepcopy(model.state_dict()), images()
    want = model(x)
    other = timm.create_model("ecaresnet26t").eval()
    fuse_tails_(other)
    other.load_state_dict(state)
    assert relative_difference(other(x), want) < 1e-6


def test_an_optimizer_goes_on_with_the_same_parameters() -> None:
    model = timm.create_model("ecaresnet26t")
    before = [id(p) for p in model.parameters()]
    fuse_tails_(model)
    assert [id(p) for p in model.parameters()] == before


def test_what_timm_drops_at_random_is_dropped() -> None:
    model = randomise_(timm.create_model("resnet26d", drop_path_rate=0.5, drop_block_rate=0.1))
    twin = copy.deepcopy(model)
    fuse_tails_(twin)
    assert_trains_the_same(model, twin)


def test_stochastic_depth_of_torchvision_is_dropped() -> None:
    model = randomise_(torchvision.models.efficientnet_b0(stochastic_depth_prob=0.9, dropout=0.0))
    twin = copy.deepcopy(model)
    fuse_tails_(twin)
    assert_trains_the_same(model, twin)


def test_a_second_call_does_nothing() -> None:
    model = build("narrow/resnet18")
    fuse_tails_(model)
    report = fuse_tails_(model)
    assert report.rows == ()
    assert report.notes == ("8 blocks run on the fused tail already",)


def test_prints_blocks_norms_and_gates() -> None:
    model = timm.create_model("ecaresnet26t")
    lines = str(fuse_tails_(model)).splitlines()
    assert lines[0].split() == ["name", "gate", "where", "channels"]
    assert lines[2].split() == ["layer1.0", "ECA", "layer1.0.bn3", "256"]
    assert lines[-1] == "8 tails fused"


def test_a_network_without_such_blocks() -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg11()
    with pytest.raises(ValueError, match=r"VGG has no block with a fused tail \(known: .*resnet.BasicBlock"):
        fuse_tails_(model)


def test_a_block_with_a_forward_of_its_own_is_left_out() -> None:
    model = build("narrow/resnet18")
    block = model.layer1[0]
    block.forward = block.forward
    report = fuse_tails_(model)
    assert len(report.rows) == 7
    assert report.notes == ("left out: layer1.0 has a forward of its own",)


@pytest.mark.parametrize("path", ["layer1.0.se", "layer1.0.se.conv"])
def test_a_hook_on_timms_attention_still_fires(path) -> None:
    model, seen = build("timm/ecaresnet26t"), []
    model.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    fuse_tails_(model)
    model(images())
    assert seen == [path]


def test_attention_whose_weight_is_computed_is_called_as_it_is() -> None:
    model, x = build("timm/ecaresnet26t"), images()
    torch.nn.utils.parametrizations.weight_norm(model.layer2[0].se.conv)
    before = model(x)
    fuse_tails_(model)
    assert type(model.layer2[0].se).__name__ == "EcaModule"
    assert relative_difference(model(x), before) < 1e-5


@pytest.mark.parametrize("block", FUSED)
def test_fused_classes_derive_from_the_block(block) -> None:
    module, _, name = FUSED[block].fused.rpartition(".")
    cls = getattr(__import__(module, fromlist=[name]), name)
    assert block in [qualified_name(base) for base in cls.__mro__[1:]]


def test_compiled_and_optimised() -> None:
    model, x = build("narrow/resnet18"), images()
    insert_gates_(model, preserve=False)
    with torch.no_grad():
        want = model(x)
        fuse_tails_(model)
        assert relative_difference(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want) < 1e-5
        assert relative_difference(ecanet.optimize_for_inference(model)(x), want) < 1e-5
