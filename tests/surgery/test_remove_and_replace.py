"""replace_gates_ and remove_gates_: what comes in the place of what, and what stays."""

import copy

import pytest
import timm
import torch
import torchvision
from networks import assert_same_state, build, gated_resnet18, images, relative_difference, resnet18
from torch import nn

import ecanet
from ecanet import ECA, SE, insert_gates_, remove_gates_, replace_gates_
from ecanet.inspect import gates, parameters


def train_(model: nn.Module) -> None:
    for gate in gates(model).values():
        for parameter in gate.parameters():
            nn.init.normal_(parameter)


class TestRemove:
    @pytest.mark.parametrize("gate", ["eca", "se", "eca_ns"])
    @pytest.mark.parametrize("where", ["block", "stage", "conv"])
    def test_neutral_gates_leave_the_original_network(self, gate, where) -> None:
        model = resnet18()
        state, hooks = copy.deepcopy(model.state_dict()), len(model._load_state_dict_pre_hooks)
        inserted = insert_gates_(model, gate, where)
        removed = remove_gates_(model)
        assert [row.name for row in removed.rows] == [row.name for row in inserted.rows]
        assert removed.parameters == -inserted.parameters
        assert list(removed.replaced) == [row.name for row in inserted.rows]
        assert_same_state(model.state_dict(), state)
        assert not any(module._forward_hooks for module in model.modules())
        assert len(model._load_state_dict_pre_hooks) == hooks

    def test_trained_gates_are_refused_and_stay(self) -> None:
        model, x = gated_resnet18(), images()
        nn.init.ones_(model.layer4[1].bn2.gate.conv.weight)
        before = model(x)
        with pytest.raises(ValueError, match=r"after layer4.1.bn2 are not constant.*force=True"):
            remove_gates_(model)
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize("fold", [False, True])
    def test_forced_trained_gates_leave_the_norms_of_the_plain_network(self, fold) -> None:
        model, plain, x = resnet18(), resnet18(), images()
        plain.load_state_dict(model.state_dict())
        insert_gates_(model, fold=fold)
        train_(model)
        remove_gates_(model, force=True, fold=fold)
        assert torch.equal(model(x), plain(x))

    def test_some_can_be_chosen(self) -> None:
        model = gated_resnet18()
        assert len(remove_gates_(model, filter_fn=lambda gate, name: name.startswith("layer1")).rows) == 2
        assert len(gates(model)) == 6

    def test_no_gates_nothing_to_do(self) -> None:
        report = remove_gates_(resnet18())
        assert (report.rows, str(report)) == ((), "0 gates removed")

    def test_an_optimizer_forgets_them(self) -> None:
        model = resnet18()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        insert_gates_(model, optimizer=optimizer)
        model(images()).sum().backward()
        optimizer.step()
        remove_gates_(model, force=True, optimizer=optimizer)
        kept = {id(p) for p in model.parameters()}
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == kept
        assert {id(p) for p in optimizer.state} <= kept

    def test_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            model = torchvision.models.resnet18()
        keys = list(model.state_dict())
        insert_gates_(model)
        remove_gates_(model)
        assert list(model.state_dict()) == keys


NATIVE = {
    "torchvision/mobilenet_v3_small": 9,
    "torchvision/efficientnet_b0": 16,
    "timm/seresnet18": 8,
    "timm/mobilenetv3_small_050": 9,
    "timm/ecaresnet26t": 8,
    "timm/regnety_002": 13,
}


class TestReplace:
    @pytest.mark.parametrize("name", NATIVE)
    @pytest.mark.parametrize("gate", ["eca", "se"])
    def test_attention_of_torchvision_and_timm(self, name, gate) -> None:
        model, x = build(name), images()
        state, before = copy.deepcopy(model.state_dict()), model(x)
        report = replace_gates_(model, gate)
        assert len(report.rows) == len(report.replaced) == NATIVE[name]
        assert {type(module) for module in gates(model).values()} == {{"eca": ECA, "se": SE}[gate]}
        model(x).sum().backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for g in gates(model).values() for p in g.parameters()
        )
        model.load_state_dict(state)  # what is there for the old attention is left out

        back = replace_gates_(model, report.replaced)

        assert back.parameters == -report.parameters
        assert_same_state(model.state_dict(), state)
        assert torch.equal(model(x), before)

    def test_parameters_are_what_the_network_gains(self) -> None:
        plain, model = build("torchvision/mobilenet_v3_small"), build("torchvision/mobilenet_v3_small")
        report = replace_gates_(model)
        assert report.parameters == parameters(model) - parameters(plain)
        assert report.multiply_adds is not None
        assert report.multiply_adds < 0

    def test_neutral_gates_are_replaced_by_neutral_ones(self) -> None:
        model, x = resnet18(), images()
        before = model(x)
        insert_gates_(model)
        report = replace_gates_(model, "se")
        assert torch.equal(model(x), before)
        assert [type(gate) for gate in gates(model).values()] == [SE] * 8
        replace_gates_(model, "eca")
        remove_gates_(model)
        assert torch.equal(model(x), before)
        assert report.rows[0].name == "layer1.0.bn2.gate"

    @pytest.mark.parametrize("where", ["block", "conv"])
    def test_a_plain_checkpoint_still_loads(self, where) -> None:
        model, plain, x = resnet18(), resnet18(), images()
        insert_gates_(model, where=where)
        train_(model)
        replace_gates_(model, "se")
        train_(model)
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model(x), plain(x))

    def test_what_is_such_a_gate_already_stays(self) -> None:
        model = ecanet.models.eca_resnet18()
        gate = model.layer1[0].eca
        report = replace_gates_(model, "eca")
        assert report.rows == ()
        assert model.layer1[0].eca is gate
        assert len(replace_gates_(model, "eca", kernel_size=9).rows) == 8

    def test_our_own_networks(self) -> None:
        model, x = ecanet.models.eca_resnet18().eval(), images()
        replace_gates_(model, "se", filter_fn=lambda gate, name: name.startswith("layer4"))
        assert [type(block.eca) for stage in (model.layer3, model.layer4) for block in stage] == [ECA, ECA, SE, SE]
        assert model(x).shape == (2, 1000)

    def test_channels_are_known_without_a_run(self) -> None:
        report = replace_gates_(timm.create_model("ecaresnet26t"), "se", input_shape=None)
        assert [row.channels for row in report.rows] == [256, 256, 512, 512, 1024, 1024, 2048, 2048]

    def test_an_optimizer_follows(self) -> None:
        model = build("timm/seresnet18")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        replace_gates_(model, "eca", optimizer=optimizer)
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"gate": "ecca"}, "gate must be one of"),
            ({"filter_fn": lambda module, name: False}, "refuses all of the 9"),
            ({"gate": {"features.0": nn.Identity()}}, "where the network has no attention"),
            ({"gate": "se_gc1", "input_shape": None}, r"features.5.block.2, 240 channels|groups must divide"),
        ],
    )
    def test_refusals_leave_the_network_as_it_was(self, arguments, says) -> None:
        model = build("torchvision/mobilenet_v3_small")
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=says):
            replace_gates_(model, **arguments)
        assert_same_state(model.state_dict(), state)

    def test_a_network_without_attention(self) -> None:
        with pytest.raises(ValueError, match=r"ResNet has no attention to replace.*insert_gates_ puts gates in"):
            replace_gates_(resnet18())

    def test_what_is_put_back_has_type_and_mode_of_what_was_there(self) -> None:
        model = build("torchvision/mobilenet_v3_small").train()
        report = replace_gates_(model)
        model.double().eval()
        replace_gates_(model, report.replaced)
        assert not any(module.training for module in model.modules())
        assert model(images(dtype=torch.float64)).dtype == torch.float64

    def test_a_neutral_gate_needs_one_that_can_be_neutral(self) -> None:
        model = gated_resnet18()
        with pytest.raises(ValueError, match=r"layer1.0.bn2.gate is neutral.*take another gate"):
            replace_gates_(model, "se_var1")

    def test_shared_attention_stays_shared(self) -> None:
        model = build("timm/seresnet18")
        model.layer1[1].se = model.layer1[0].se
        assert len(replace_gates_(model).rows) == 7
        assert model.layer1[1].se is model.layer1[0].se
        assert isinstance(model.layer1[0].se, ECA)


def test_relative_difference_sees_a_difference() -> None:
    assert relative_difference(torch.ones(3) + 1e-3, torch.ones(3)) > 5e-4
