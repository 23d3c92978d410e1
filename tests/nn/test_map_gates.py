"""CBAM and SimAM, gates that see the map itself, are gates in every interface: tail, networks, surgery, files."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

import ecanet
from ecanet.models import small_eca_resnet
from ecanet.nn import CBAM, MapGate, SimAM, build_gate, norm_gate_add_act
from ecanet.nn.attached import attach_

C = 16
every_map_gate = pytest.mark.parametrize("name", ["cbam", "simam"])


@every_map_gate
@pytest.mark.parametrize("is_attached", [False, True], ids=["passed", "attached to the norm"])
@pytest.mark.parametrize("shape", [(8, C), (3, C, 6), (3, C, 6, 5), (3, C, 2, 4, 5)], ids=str)
def test_in_a_tail_they_are_called_with_the_values_and_gradients_of_the_modules(name, is_attached, shape) -> None:
    norm = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(len(shape), nn.BatchNorm1d)(C).double()
    gate = build_gate(name, C).double()
    twins = copy.deepcopy((norm, gate))
    x, residual = torch.randn(2, *shape, dtype=torch.float64).unbind()
    x.requires_grad_()
    want = torch.relu(twins[1](twins[0](x)) + residual)
    if is_attached:
        attach_(norm, gate)
    got = norm_gate_add_act(x, norm, None if is_attached else gate, residual, "relu")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    dout = torch.randn_like(want)
    found, wanted = ([x, *n.parameters(), *g.parameters()] for n, g in ((norm, gate), twins))
    found = list(dict.fromkeys(found))  # an attached gate is part of its norm
    for g, w in zip(torch.autograd.grad(got, found, dout), torch.autograd.grad(want, wanted, dout), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_cbam_starts_a_trained_network_as_it_was_with_a_factor_of_4() -> None:
    model = torchvision.models.resnet18().eval()
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    report = ecanet.insert_gates_(model, "cbam", input_shape=(1, 3, 32, 32))
    gates = [module for module in model.modules() if isinstance(module, CBAM)]
    assert len(gates) == len(report.rows) == 8
    assert report.parameters == sum(p.numel() for gate in gates for p in gate.parameters())
    assert [(gate.factor, gate.scale.item(), gate.constant()) for gate in gates] == [(4, 4, 1)] * 8
    assert torch.equal(model(x), before)
    file = copy.deepcopy(model.state_dict())
    assert "layer1.0.bn2.gate.scale" in file
    ecanet.fuse_tails_(model)
    model.load_state_dict(file, strict=True)
    torch.testing.assert_close(model(x), before)
    ecanet.remove_gates_(model)
    torch.testing.assert_close(model(x), before)


def test_cbam_takes_the_place_of_a_neutral_gate_and_of_timms_module() -> None:
    model = torchvision.models.resnet18().eval()
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    ecanet.insert_gates_(model, "eca", input_shape=(1, 3, 32, 32))
    ecanet.replace_gates_(model, "cbam", input_shape=(1, 3, 32, 32))
    assert torch.equal(model(x), before)
    timm_module = pytest.importorskip("timm.layers.cbam").CbamModule(C)
    other = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), timm_module)
    ecanet.replace_gates_(other, "cbam", input_shape=(1, 3, 9, 9))
    other[2].load_state_dict(timm_module.state_dict(), strict=True)
    y = torch.randn(2, C, 9, 9)
    torch.testing.assert_close(other[2].eval()(y), timm_module.eval()(y))


@every_map_gate
def test_networks_take_them_by_name_and_train(name) -> None:
    model = small_eca_resnet(gate=name)
    assert sum(isinstance(module, MapGate) for module in model.modules()) == 3
    model(torch.randn(2, 3, 28, 28)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 3, 28, 28)).isfinite().all()


def test_simam_refuses_a_neutral_start_and_nothing_changes() -> None:
    model = torchvision.models.resnet18()
    keys = list(model.state_dict())
    with pytest.raises(
        ValueError, match=r"preserve=True cannot keep the function: SimAM cannot be made neutral.*preserve"
    ):
        ecanet.insert_gates_(model, "simam", input_shape=(1, 3, 32, 32))
    assert list(model.state_dict()) == keys
    report = ecanet.insert_gates_(model, "simam", preserve=False, input_shape=(1, 3, 32, 32))
    assert (len(report.rows), report.parameters) == (8, 0)


def test_the_norm_inside_cbam_is_shared_by_processes_like_any_other() -> None:
    gate = CBAM(C)
    gate.make_identity_()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(gate)
    assert isinstance(converted.spatial.conv.bn, nn.SyncBatchNorm)
    assert converted.constant() == 1


def test_layers_inside_cbam_are_called_where_they_are_more_than_plain_layers() -> None:
    gate, x = CBAM(C).eval(), torch.randn(2, C, 5, 5)
    before = gate(x)
    for layer in (gate.channel.fc1, gate.channel.fc2, gate.spatial.conv.conv, gate.spatial.conv.bn):
        handle = layer.register_forward_hook(lambda module, args, out: out + 1)
        assert not torch.allclose(gate(x), before), layer
        handle.remove()
        assert torch.equal(gate(x), before)


def test_a_gate_of_the_map_needs_only_what_it_makes_of_the_map() -> None:
    class ByPosition(MapGate):
        def scale_map(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x.float().mean(1, keepdim=True))

    gate, x = ByPosition(C, factor=2.0), torch.randn(2, C, 5, 5).bfloat16()
    want = (2 * x.float() * torch.sigmoid(x.float().mean(1, keepdim=True))).bfloat16()
    assert torch.equal(norm_gate_add_act(x, None, gate), want)
    assert gate.constant() is None
    assert SimAM(C).constant() is None
