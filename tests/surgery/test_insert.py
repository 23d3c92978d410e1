"""insert_gates_: where gates go, what they keep, and what is refused."""

import copy
import logging
import pickle
import warnings

import pytest
import timm
import torch
import torchvision
from networks import (
    GATES_WITH_WEIGHTS,
    assert_same_state,
    build,
    gated_resnet18,
    images,
    randomise_,
    relative_difference,
    resnet18,
)
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet import ECA, insert_gates_, remove_gates_
from ecanet.inspect import gates, multiply_adds, parameters
from ecanet.nn import SE


def vgg() -> nn.Module:
    """Convolutions, norms and activations in a row, as VGG has them: activations are 2, 6 and 9."""
    return randomise_(torchvision.models.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True)).eval()


class TestWhere:
    def test_block_follows_the_last_norm_of_every_branch(self) -> None:
        report = insert_gates_(resnet18())
        assert [row.where for row in report.rows] == [f"layer{i}.{j}.bn2" for i in (1, 2, 3, 4) for j in (0, 1)]
        assert [row.kernel_size for row in report.rows] == [3, 3, 5, 5, 5, 5, 5, 5]

    def test_every_inverted_residual_has_one_also_without_an_addition(self) -> None:
        model = build("torchvision/mobilenet_v2")
        report = insert_gates_(model)
        eca = ecanet.models.eca_mobilenet_v2()
        assert [row.channels for row in report.rows] == [gate.channels for gate in gates(eca).values()]

    def test_stage_follows_the_last_block_of_every_stage(self) -> None:
        assert [row.where for row in insert_gates_(resnet18(), where="stage").rows] == [
            "layer1.1", "layer2.1", "layer3.1", "layer4.1",
        ]  # fmt: skip

    def test_stages_of_a_flat_network_are_runs_of_as_many_channels(self) -> None:
        report = insert_gates_(build("torchvision/mobilenet_v2"), where="stage")
        assert [row.channels for row in report.rows] == [16, 24, 32, 64, 96, 160, 320]

    def test_conv_follows_every_convolution_with_an_activation(self) -> None:
        assert [row.where for row in insert_gates_(vgg(), where="conv").rows] == ["2", "6", "9"]

    def test_conv_hangs_gates_on_norms_where_the_activation_is_shared(self) -> None:
        report = insert_gates_(resnet18(), where="conv")
        assert [row.where for row in report.rows][:3] == ["relu", "layer1.0.bn1", "layer1.1.bn1"]

    @pytest.mark.parametrize(
        ("where", "hosts"),
        [
            ("layer4.1.bn2", ["layer4.1.bn2"]),
            ("layer?.1.bn2", [f"layer{i}.1.bn2" for i in (1, 2, 3, 4)]),
            (["layer1", "layer2.0.conv1"], ["layer1.1", "layer2.0.conv1"]),  # a sequence returns what its last returns
            (lambda module, name: isinstance(module, nn.MaxPool2d), ["maxpool"]),
        ],
        ids=["name", "pattern", "names", "function"],
    )
    def test_modules_can_be_named(self, where, hosts) -> None:
        model, x = resnet18(), images()
        before = model(x)
        report = insert_gates_(model, where=where)
        assert [row.where for row in report.rows] == hosts
        assert torch.equal(model(x), before)

    def test_filter_fn_is_asked_for_blocks(self) -> None:
        seen = []

        def wide(block: nn.Module, name: str) -> bool:
            seen.append(type(block).__name__)
            return name.startswith("layer4")

        report = insert_gates_(resnet18(), filter_fn=wide)
        assert [row.where for row in report.rows] == ["layer4.0.bn2", "layer4.1.bn2"]
        assert seen == ["BasicBlock"] * 8

    @pytest.mark.parametrize(
        ("build_model", "where", "says"),
        [
            (resnet18, "layr4.0", "close to it: layer4.0"),
            (resnet18, [], "names nothing"),
            (resnet18, 3, "where must be one of"),
            (resnet18, lambda module, name: False, "true for no module"),
            (vgg, "block", "try where='conv'.*can be named: 0, 1, 4"),
            (lambda: nn.Sequential(nn.Linear(3, 3)), "conv", "finds no convolution"),
            (lambda: build("torchvision/densenet121"), "stage", "use where='block'"),
            (lambda: nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(3, 3, 1)])}), "a", "name a module in it"),
        ],
        ids=["misspelt", "empty", "number", "nothing true", "no residual", "no convolution", "joined", "container"],
    )
    def test_what_is_not_found_says_what_can_be_named(self, build_model, where, says) -> None:
        with pytest.raises((ValueError, TypeError), match=says):
            insert_gates_(build_model(), where=where)

    def test_filter_that_refuses_all_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="refuses all of the 8 blocks"):
            insert_gates_(resnet18(), filter_fn=lambda block, name: False)

    def test_code_that_cannot_be_traced_is_named(self) -> None:
        class Untraceable(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.conv(x) if x.sum() > 0 else x

        with pytest.raises(
            ValueError, match=r"0: torch.fx cannot trace its code.*modules that can be named: 0, 0\.conv"
        ):
            insert_gates_(nn.Sequential(Untraceable()))


class TestFunction:
    @pytest.mark.parametrize("name", GATES_WITH_WEIGHTS)
    def test_every_gate_with_weights_preserves_it(self, name) -> None:
        model, x = resnet18(), images()
        before = model(x)
        insert_gates_(model, name)
        assert torch.equal(model(x), before)

    def test_a_gate_without_weights_cannot_and_nothing_has_changed(self) -> None:
        model = resnet18()
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"preserve=True cannot keep the function: SEVar1.*preserve=False"):
            insert_gates_(model, "se_var1")
        assert_same_state(model.state_dict(), state)

    def test_without_preserve_gates_start_at_random(self) -> None:
        model, x = resnet18(), images()
        before = model(x)
        insert_gates_(model, preserve=False)
        assert relative_difference(model(x), before) > 0.1
        assert all(gate.conv.weight.any() for gate in gates(model).values())

    def test_in_training_mode_too(self) -> None:
        model, x = resnet18().train(), images(batch=4)
        plain = copy.deepcopy(model)
        insert_gates_(model)
        assert torch.equal(model(x), plain(x))

    @pytest.mark.parametrize("where", ["block", "stage", "conv"])
    def test_the_gate_has_the_factor_and_nothing_else_changes(self, where) -> None:
        model = resnet18()
        before = copy.deepcopy(model.state_dict())
        insert_gates_(model, where=where)
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert {gate.factor for gate in gates(model).values()} == {2.0}
        assert all(after[f"{name}.scale"] == 2 for name in gates(model))

    @pytest.mark.parametrize(
        "norm",
        [
            nn.BatchNorm2d(8), nn.GroupNorm(2, 8), FrozenBatchNorm2d(8), nn.SyncBatchNorm(8),
            nn.BatchNorm2d(8, affine=False), nn.InstanceNorm2d(8, affine=True),
        ],
        ids=lambda norm: f"{type(norm).__name__}{'' if getattr(norm, 'affine', True) else ' without weights'}",
    )  # fmt: skip
    def test_norms_of_every_kind(self, norm) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), norm

            def forward(self, x: Tensor) -> Tensor:
                return x + self.norm(self.conv(x))

        model, x = nn.Sequential(Block()).eval(), torch.randn(2, 8, 6, 6)
        before = model(x)
        insert_gates_(model, input_shape=(1, 8, 6, 6))
        assert torch.allclose(model(x), before, rtol=1e-6, atol=1e-6)
        assert isinstance(model[0].norm.gate, ECA)

    def test_norms_that_share_their_weights_keep_them(self) -> None:
        model, x = resnet18(), images()
        model.layer1[1].bn2.weight = model.layer1[0].bn2.weight
        model.layer1[1].bn2.bias = model.layer1[0].bn2.bias
        before = model(x)
        insert_gates_(model)
        assert torch.equal(model(x), before)
        assert model.layer1[0].bn2.gate.scale == 2
        remove_gates_(model)
        assert torch.equal(model(x), before)

    def test_a_shared_block_keeps_one_gate(self) -> None:
        model = resnet18()
        model.layer1[1] = model.layer1[0]
        report = insert_gates_(model)
        assert len(report.rows) == 7
        assert model.layer1[0].bn2.gate is model.layer1[1].bn2.gate
        assert any("layer1.0.bn2 is shared" in note and "layer1.1.bn2" in note for note in report.notes)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_gates_have_the_type_of_what_they_follow(self, dtype) -> None:
        model, x = resnet18().to(dtype), images(dtype=dtype)
        before = model(x)
        insert_gates_(model)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert torch.equal(model(x), before)

    def test_networks_for_volumes(self) -> None:
        model = torchvision.models.video.r3d_18().eval()
        x = torch.randn(1, 3, 4, 16, 16)
        before = model(x)
        report = insert_gates_(model, input_shape=x.shape)
        assert len(report.rows) == 8
        assert torch.equal(model(x), before)


class TestStateDicts:
    def test_original_keys_stay_and_gates_add_theirs(self) -> None:
        model = resnet18()
        keys = list(model.state_dict())
        insert_gates_(model)
        new = [key for key in model.state_dict() if key not in keys]
        assert [key for key in model.state_dict() if key in keys] == keys
        hosts = [f"layer{i}.{j}.bn2" for i in (1, 2, 3, 4) for j in (0, 1)]
        assert new == [f"{host}.gate.{key}" for host in hosts for key in ("scale", "conv.weight")]

    def test_a_plain_checkpoint_loads_after_training_and_brings_the_plain_function(self) -> None:
        model, plain, x = gated_resnet18(), resnet18(), images()
        for gate in gates(model).values():
            nn.init.normal_(gate.conv.weight)
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model(x), plain(x))

    @pytest.mark.parametrize("where", ["block", "conv"])
    def test_a_checkpoint_with_gates_loads_as_it_is(self, where) -> None:
        trained, fresh, x = build("torchvision/mobilenet_v2"), build("torchvision/mobilenet_v2"), images()
        for model in (trained, fresh):
            insert_gates_(model, where=where)
        for gate in gates(trained).values():
            nn.init.normal_(gate.conv.weight)
        fresh.load_state_dict(trained.state_dict())
        assert torch.equal(fresh(x), trained(x))

    def test_the_caller_keeps_his_state_dict(self) -> None:
        model = resnet18()
        state = model.state_dict()
        before = {key: value.clone() for key, value in state.items()}
        copied = copy.deepcopy(model)
        insert_gates_(copied)
        copied.load_state_dict(state)
        assert_same_state(state, before)

    def test_without_preserve_a_plain_checkpoint_leaves_gates_alone(self) -> None:
        model, plain = resnet18(), resnet18()
        insert_gates_(model, preserve=False)
        gate = model.layer1[0].bn2.gate.conv.weight.detach().clone()
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model.layer1[0].bn2.gate.conv.weight, gate)
        assert torch.equal(model.layer1[0].bn2.weight, plain.layer1[0].bn2.weight)

    def test_a_head_alone_leaves_gates_alone(self) -> None:
        model = gated_resnet18()
        for gate in gates(model).values():
            nn.init.normal_(gate.conv.weight)
        state = copy.deepcopy(model.state_dict())
        head = {"fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}
        model.load_state_dict(head, strict=False)
        assert_same_state(model.state_dict(), {**state, **head})

    def test_a_checkpoint_that_lacks_more_than_gates_is_refused(self) -> None:
        model, plain = gated_resnet18(), resnet18()
        state = plain.state_dict()
        del state["fc.bias"]
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"fc.bias\"\."):
            model.load_state_dict(state)

    def test_inside_another_module(self) -> None:
        backbone, plain, x = resnet18(), resnet18(), images()
        insert_gates_(backbone)
        outer = nn.ModuleDict({"backbone": backbone})
        outer.load_state_dict(nn.ModuleDict({"backbone": plain}).state_dict())
        assert torch.equal(outer["backbone"](x), plain(x))

    @pytest.mark.parametrize(
        "twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_copies_have_gates_of_their_own_and_load_plain_checkpoints(self, twin) -> None:
        model, plain, x = gated_resnet18(), resnet18(), images()
        copied = twin(model)
        nn.init.ones_(copied.layer1[0].bn2.gate.conv.weight)
        assert not model.layer1[0].bn2.gate.conv.weight.any()
        assert relative_difference(copied(x), model(x)) > 1e-3
        copied.load_state_dict(plain.state_dict())
        assert torch.equal(copied(x), plain(x))

    def test_on_the_meta_device_and_loaded_later(self) -> None:
        with torch.device("meta"):
            model = resnet18()
        report = insert_gates_(model)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert report.multiply_adds == insert_gates_(resnet18()).multiply_adds
        plain, x = resnet18(), images()
        model = model.to_empty(device="cpu").eval()
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model(x), plain(x))


class TestOptimizer:
    def test_gates_join_the_group_of_the_norm_they_follow(self) -> None:
        model = resnet18()
        norms = [p for name, p in model.named_parameters() if "bn" in name]
        others = [p for name, p in model.named_parameters() if "bn" not in name]
        optimizer = torch.optim.AdamW([{"params": others}, {"params": norms, "weight_decay": 0.0}])
        insert_gates_(model, optimizer=optimizer)
        without_decay = {id(p) for p in optimizer.param_groups[1]["params"]}
        assert all(id(gate.conv.weight) in without_decay for gate in gates(model).values())
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))

    def test_gates_are_trained_and_a_scheduler_goes_on(self) -> None:
        model = resnet18()
        optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        model(images()).sum().backward()
        optimizer.step()
        insert_gates_(model, optimizer=optimizer)
        assert "layer1.0.bn2.gate.conv.weight" in optimizer.param_groups[0]["param_names"]
        model(images()).sum().backward()
        optimizer.step()
        scheduler.step()
        assert all(gate.conv.weight.any() for gate in gates(model).values())

    def test_something_else_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer or None, got list"):
            insert_gates_(resnet18(), optimizer=[])


class TestTwice:
    def test_a_second_call_does_nothing(self) -> None:
        model = gated_resnet18()
        state = copy.deepcopy(model.state_dict())
        report = insert_gates_(model)
        assert report.rows == ()
        assert str(report) == "8 of these have such a gate already\n0 gates inserted"
        assert_same_state(model.state_dict(), state)

    def test_another_gate_is_refused(self) -> None:
        model = gated_resnet18()
        with pytest.raises(ValueError, match=r"has a gate already, ECA\(64, kernel_size=3\).*replace_gates_ swaps"):
            insert_gates_(model, "se")

    def test_other_places_can_follow(self) -> None:
        model, x = resnet18(), images()
        before = model(x)
        insert_gates_(model)
        assert len(insert_gates_(model, where="stage").rows) == 4
        assert torch.equal(model(x), before)
        assert len(remove_gates_(model).rows) == 12


class TestReport:
    def test_counts_what_the_network_gains(self) -> None:
        plain, model = resnet18(), resnet18()
        report = insert_gates_(model, SE)
        assert report.parameters == parameters(model) - parameters(plain)
        shape = (1, 3, 224, 224)
        assert report.multiply_adds == multiply_adds(model, shape) - multiply_adds(plain, shape)

    def test_prints_as_a_table(self) -> None:
        lines = str(insert_gates_(resnet18(), filter_fn=lambda _, name: name == "layer1.0")).splitlines()
        assert lines == [
            "name               gate  where         channels  k  params     MAdds",
            "--------------------------------------------------------------------",
            "layer1.0.bn2.gate  ECA   layer1.0.bn2        64  3      +3  +200,896",
            "1 gate inserted: +3 parameters, +200,896 multiply-adds per sample",
        ]

    def test_a_network_that_wants_another_input_says_that_nothing_was_counted(self) -> None:
        model = timm.create_model("resnet10t", in_chans=1)
        report = insert_gates_(model, input_shape=(1, 3, 224, 224))
        assert report.multiply_adds is None
        assert any("does not run on an input of shape (1, 3, 224, 224)" in note for note in report.notes)
        again = insert_gates_(timm.create_model("resnet10t", in_chans=1), input_shape=(1, 1, 64, 64))
        assert again.multiply_adds is not None

    def test_a_network_of_another_size_has_that_said_once_and_no_traceback_of_torch(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 32 * 32, 10))
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        torch_s = logging.getLogger("torch._subclasses.fake_tensor")
        torch_s.addHandler(handler)
        try:
            with pytest.raises(
                ValueError, match=r"no residual block in Sequential \(the network does not run on an input"
            ):
                insert_gates_(model)
            assert not torch_s.disabled
        finally:
            torch_s.removeHandler(handler)
        assert not records
        assert len(insert_gates_(model, where="conv").rows) == 1

    def test_the_dry_run_leaves_the_network_alone(self) -> None:
        model = resnet18().train()
        state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        insert_gates_(model, preserve=False, gate=lambda channels: SE(channels))
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in state.items())
        assert all(module.training for module in model.modules())
        assert not torch.equal(torch.get_rng_state(), rng)  # gates were drawn, the dry run drew nothing beside them
        torch.set_rng_state(rng)
        for gate in gates(model).values():
            SE(gate.channels)
        drawn = torch.get_rng_state()
        torch.set_rng_state(rng)
        insert_gates_(resnet18_with(rng), preserve=False, gate=lambda channels: SE(channels), input_shape=None)
        assert torch.equal(torch.get_rng_state(), drawn)


def resnet18_with(rng: Tensor) -> nn.Module:
    model = resnet18()
    torch.set_rng_state(rng)
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.trace(nn.Conv2d(3, 3, 1), torch.ones(1, 3, 1, 1), check_trace=False)


def compiled_in_place() -> nn.Module:
    model = vgg()
    model.compile()
    return model


class TestRefusals:
    @pytest.mark.parametrize(
        ("build_model", "says"),
        [
            (lambda: "resnet50", "model must be a torch.nn.Module, got str"),
            (lambda: nn.DataParallel(vgg()), r"model is wrapped.*pass the plain model, such as model.module"),
            (lambda: nn.ModuleDict({"net": nn.DataParallel(vgg())}), r"model.net is wrapped"),
            (lambda: torch.compile(vgg()), r"model is compiled: pass the model before torch.compile"),
            (compiled_in_place, "model is compiled"),
            (scripted, "model is scripted or traced: pass the original model"),
        ],
        ids=["no module", "parallel", "part of it", "compiled", "compiled in place", "scripted"],
    )
    @pytest.mark.parametrize(
        "surgery",
        [insert_gates_, ecanet.replace_gates_, remove_gates_, ecanet.fuse_tails_],
        ids=lambda surgery: surgery.__name__,
    )
    def test_models_that_cannot_be_changed(self, surgery, build_model, says) -> None:
        with pytest.raises(TypeError, match=says):
            surgery(build_model())

    @pytest.mark.parametrize(
        ("arguments", "error", "says"),
        [
            ({"gate": "ecca"}, ValueError, "gate must be one of"),
            ({"gate": ECA(64)}, TypeError, "every block needs a gate of its own"),
            ({"gate": "se_gc2", "where": "maxpool", "filter_fn": None, "kernel_size": 3}, ValueError, "no kernel size"),
            ({"kernel_size": 4}, ValueError, "kernel_size must be odd"),
            ({"input_shape": 224}, TypeError, "input_shape must be a sequence of integers"),
            ({"input_shape": (1, 3, 0, 0)}, ValueError, "sizes of 1 or more"),
        ],
    )
    def test_arguments(self, arguments, error, says) -> None:
        model = resnet18()
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=says):
            insert_gates_(model, **arguments)
        assert_same_state(model.state_dict(), state)

    def test_a_gate_that_does_not_fit_one_place_changes_none(self) -> None:
        model = build("torchvision/mobilenet_v2")
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"features.2.conv.3, 24 channels: channels must be a multiple of 16"):
            insert_gates_(model, "se_gc2")
        assert_same_state(model.state_dict(), state)

    def test_a_gate_of_somebody_else_needs_preserve_false_or_make_neutral(self) -> None:
        with pytest.raises(ValueError, match=r"Identity has no make_neutral_\(\).*preserve=False"):
            insert_gates_(resnet18(), lambda channels: nn.Identity())
        assert len(insert_gates_(resnet18(), lambda channels: nn.Identity(), preserve=False).rows) == 8

    def test_maps_with_channels_last_in_their_shape(self) -> None:
        with pytest.raises(ValueError, match="has its 96 channels last, not in dimension 1"):
            insert_gates_(build("torchvision/convnext_tiny"), where="features.1.0.block.5")

    def test_a_module_that_has_something_called_gate(self) -> None:
        class Gated(nn.Conv2d):
            gate = 3

        with pytest.raises(ValueError, match=r"cannot be attached to 0: Gated has its own .gate."):
            insert_gates_(nn.Sequential(Gated(3, 8, 1)), where="0")

    def test_a_network_that_has_attention_there(self) -> None:
        with pytest.raises(ValueError, match=r"layer1.0.eca \(ECA\): replace_gates_ swaps it, and 7 more such blocks"):
            insert_gates_(ecanet.models.eca_resnet18())


class TestDeployment:
    def test_compiled_exported_and_optimised_networks_give_the_same(self) -> None:
        model, x = resnet18(), images()
        insert_gates_(model, preserve=False)
        with torch.no_grad():
            want = model(x)
            assert relative_difference(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want) < 1e-5
            assert relative_difference(torch.export.export(model, (x,)).module()(x), want) < 1e-5
            fast = ecanet.optimize_for_inference(model)
            assert relative_difference(fast(x), want) < 1e-5
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
        assert sum(type(module).__name__ == "InferenceTail" for module in fast.modules()) == 8

    @pytest.mark.parametrize("where", ["stage", "conv"])
    def test_optimised_wherever_gates_hang(self, where) -> None:
        model, x = build("torchvision/mobilenet_v2"), images()
        insert_gates_(model, where=where, preserve=False)
        with torch.no_grad():
            assert relative_difference(ecanet.optimize_for_inference(model)(x), model(x)) < 1e-5

    def test_hooks_of_users_still_fire(self) -> None:
        model, seen = gated_resnet18(), []
        model.layer1[0].bn2.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        model(images())
        assert seen == [(2, 64, 16, 16)]


def test_randomised_networks_differ_from_new_ones() -> None:
    assert relative_difference(randomise_(nn.BatchNorm2d(64)).weight, torch.ones(64)) > 0.1


class LazilyCached(nn.Module):
    """A network that keeps a tensor of its first run, as relative positions are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.grid: Tensor | None = None
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.linspace(0, 1, x.shape[-1])
        self.kept["input"] = x
        return x + self.bn(self.conv(x * self.grid))


class TestDryRun:
    def test_what_a_network_keeps_of_a_run_stays_out_of_it(self) -> None:
        model = nn.Sequential(LazilyCached()).eval()
        seen: list[Tensor] = []
        model[0].conv.register_forward_hook(lambda module, args, output: seen.append(output))
        insert_gates_(model, where="0.bn", input_shape=(1, 3, 8, 8))
        assert model[0].grid is None
        assert model[0].kept == {}
        assert seen == []

    def test_after_a_refusal_too(self) -> None:
        model = nn.Sequential(LazilyCached()).eval()
        with pytest.raises(ValueError, match="preserve=True cannot keep the function"):
            insert_gates_(model, "se_var1", where="0.bn", input_shape=(1, 3, 8, 8))
        assert model[0].grid is None

    def test_real_networks_give_real_tensors(self) -> None:
        model = timm.create_model("levit_conv_128s", num_classes=3).eval()
        insert_gates_(model)
        assert type(model(torch.randn(1, 3, 224, 224)).detach()) is Tensor

    def test_parameters_without_values_are_refused(self) -> None:
        with pytest.raises(TypeError, match=r"model\.0 has parameters that are not initialised: run it once"):
            insert_gates_(nn.Sequential(nn.LazyConv2d(8, 3)), where="0")

    def test_a_gate_that_does_not_run_costs_nothing_and_changes_nothing(self) -> None:
        class Bypassed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.bn.forward(self.conv(x))

        model, x = randomise_(nn.Sequential(Bypassed())).eval(), images(8)
        before = model(x)
        report = insert_gates_(model, where="0.bn", input_shape=(1, 3, 8, 8))
        assert torch.equal(model(x), before)
        assert report.notes == ("0.bn did not run on the input of shape (1, 3, 8, 8)",)
        assert report.multiply_adds == 0


PLACES = [
    ("narrow/resnet18", "block"), ("narrow/resnet18", "stage"), ("narrow/resnet18", "conv"),
    ("torchvision/shufflenet_v2_x0_5", "block"), ("torchvision/squeezenet1_1", "conv"), ("timm/convnext_atto", "block"),
]  # fmt: skip


class TestWhereverGatesHang:
    @pytest.mark.parametrize(("name", "where"), PLACES)
    def test_device_and_type_are_those_of_the_network(self, name, where) -> None:
        with torch.device("meta"):
            model = build(name)
        insert_gates_(model, where=where)
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
        model = build(name).double()
        insert_gates_(model, where=where)
        assert {p.dtype for p in model.parameters()} == {torch.float64}

    @pytest.mark.parametrize(("name", "where"), PLACES)
    def test_a_part_of_a_checkpoint_leaves_trained_gates_alone(self, name, where) -> None:
        model = build(name)
        last = next(key for key in reversed(list(model.state_dict())) if key.endswith("bias"))
        insert_gates_(model, where=where)
        for gate in gates(model).values():
            nn.init.normal_(gate.conv.weight)
        state = copy.deepcopy(model.state_dict())
        model.load_state_dict({last: state[last] + 1}, strict=False)
        assert_same_state(model.state_dict(), {**state, last: state[last] + 1})

    @pytest.mark.parametrize(("name", "where"), PLACES)
    def test_a_plain_checkpoint_makes_trained_gates_neutral(self, name, where) -> None:
        model, plain, x = build(name), build(name), images()
        insert_gates_(model, where=where)
        for gate in gates(model).values():
            nn.init.normal_(gate.conv.weight)
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model(x), plain(x))

    @pytest.mark.parametrize(("name", "where"), PLACES)
    def test_a_network_without_values_is_given_them(self, name, where) -> None:
        plain, x = build(name), images()
        with torch.device("meta"):
            model = build(name)
        insert_gates_(model, "se", where=where)
        model.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True)
        assert torch.equal(model.eval()(x), plain(x))

    def test_a_part_of_the_network_loads_its_own_original_keys(self) -> None:
        model, plain, x = gated_resnet18(), resnet18(), images()
        for gate in gates(model).values():
            nn.init.normal_(gate.conv.weight)
        for name, part in plain.named_children():
            getattr(model, name).load_state_dict(part.state_dict())
        assert torch.equal(model(x), plain(x))


class OneMore(nn.BatchNorm2d):
    """A norm whose weight is what it multiplies with, less 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class TestNorms:
    @pytest.mark.parametrize(
        "change",
        [
            lambda bn: torch.nn.utils.parametrize.register_parametrization(bn, "weight", nn.Softplus()),
            lambda bn: prune.l1_unstructured(bn, "weight", 0.25),
            lambda bn: setattr(bn, "__class__", OneMore),
            lambda bn: setattr(bn, "weight", nn.Parameter(torch.ones(1).expand(64))),
        ],
        ids=["parametrized", "pruned", "of another class", "that cannot be written"],
    )
    def test_a_norm_whose_weight_is_not_simply_its_factor_is_left_alone(self, change) -> None:
        model, x = resnet18(), images()
        change(model.layer1[0].bn2)
        before = model(x)
        insert_gates_(model)
        assert torch.equal(model(x), before)
        assert model.layer1[0].bn2.gate.scale == 2

    @pytest.mark.parametrize("fused", [False, True])
    def test_gates_come_along_when_norms_are_converted(self, fused) -> None:
        model, x = resnet18(), images()
        plain = copy.deepcopy(model)
        insert_gates_(model)
        if fused:
            ecanet.fuse_tails_(model)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert isinstance(model.layer1[0].bn2, nn.SyncBatchNorm)
        assert relative_difference(model(x), plain(x)) < 1e-6
        assert len(insert_gates_(model).rows) == 0
        remove_gates_(model)
        assert list(model.state_dict()) == list(plain.state_dict())


class TestNames:
    def test_a_users_own_module_called_gate_can_be_named(self) -> None:
        model = nn.Sequential()
        model.add_module("gate", nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()))
        assert [row.where for row in insert_gates_(model, where="gate.0").rows] == ["gate.0"]

    def test_a_sequence_that_does_more_than_its_modules_gets_the_gate_itself(self) -> None:
        class Skip(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return x + super().forward(x)

        model = nn.Sequential(Skip(nn.Conv2d(3, 3, 1)))
        with pytest.raises(ValueError, match="0 is a Skip"):
            insert_gates_(model, where="0", input_shape=(1, 3, 8, 8))

    def test_an_empty_sequence_at_the_end_of_a_branch_is_passed(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sequential())

            def forward(self, x: Tensor) -> Tensor:
                return x + self.branch(x)

        assert [row.where for row in insert_gates_(nn.Sequential(Block())).rows] == ["0.branch.1"]


class TestMoreRefusals:
    @pytest.mark.parametrize(
        ("make", "error", "says"),
        [
            (lambda model: torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), ValueError, "none of the model's"),
            (
                lambda model: torch.optim.LBFGS(model.parameters()),
                TypeError,
                "LBFGS cannot take new parameters: build it after",
            ),
        ],
    )
    def test_optimizers_that_cannot_follow(self, make, error, says) -> None:
        model = resnet18()
        with pytest.raises(error, match=says):
            insert_gates_(model, optimizer=make(model))
        assert not gates(model)

    def test_a_gate_of_another_number_of_channels(self) -> None:
        with pytest.raises(ValueError, match=r"gate made a ECA of 65 channels for layer1.0.bn2, which has 64"):
            insert_gates_(resnet18(), lambda channels: ECA(channels + 1))

    @pytest.mark.parametrize("argument", ["preserve", "fold"])
    def test_true_or_false(self, argument) -> None:
        with pytest.raises(TypeError, match=f"{argument} must be True or False, got 'no'"):
            insert_gates_(resnet18(), **{argument: "no"})
