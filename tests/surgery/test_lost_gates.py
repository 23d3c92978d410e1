"""No gate is lost in silence where tools merge, rebuild, quantise or swap the modules that gates are attached to."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.fusion
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet import insert_gates_, optimize_for_inference, replace_gates_
from ecanet.nn import ECA, SE, SEVar1
from ecanet.nn.attached import attach_, attached_gate, attached_gates

C = 8


class Block(nn.Module):
    """Convolution, norm that carries a gate, activation."""

    def __init__(self, host: str = "bn") -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(C)
        self.act = nn.ReLU()
        nn.init.uniform_(self.bn.running_var, 0.5, 1.5)
        nn.init.normal_(self.bn.running_mean)
        attach_(self.get_submodule(host), SEVar1(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def maps() -> Tensor:
    return torch.randn(2, C, 6, 5)


# Merging a norm into the layer before it


def fx_fuse(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def prepare_fx(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    return convert_fx(prepare_fx(model, get_default_qconfig_mapping("fbgemm"), (maps(),)))


def prepare_qat_fx(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("fbgemm"), (maps(),))


def fuse_modules(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.fuse_modules(model, [["conv", "bn", "act"]])


def fuse_modules_qat(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.fuse_modules_qat(model.train(), [["conv", "bn"]])


def by_hand(model: Any) -> nn.Module:
    model.conv, model.bn = torch.nn.utils.fusion.fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()
    return model


def by_hand_of_utils(model: Any) -> nn.Module:
    model.conv, model.bn = torch.nn.utils.fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()
    return model


def eager_static_quantisation(model: Any) -> nn.Module:
    model = nn.Sequential(torch.ao.quantization.QuantStub(), model, torch.ao.quantization.DeQuantStub()).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare(model)
    prepared(maps())
    return torch.ao.quantization.convert(prepared)


MERGES: dict[str, Callable[[Any], nn.Module]] = {
    "torch.fx.experimental.optimization.fuse": fx_fuse,
    "prepare_fx and convert_fx": prepare_fx,
    "prepare_qat_fx": prepare_qat_fx,
    "fuse_modules": fuse_modules,
    "fuse_modules_qat": fuse_modules_qat,
    "fuse_conv_bn_eval": by_hand,
    "fuse_conv_bn_eval of torch.nn.utils": by_hand_of_utils,
    "prepare and convert": eager_static_quantisation,
}


@pytest.mark.filterwarnings("ignore")  # of what torch deprecates
@pytest.mark.parametrize("host", ["conv", "bn", "act"])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_tool_that_merges_layers_keeps_the_gate_or_is_refused(merge, host) -> None:
    model, x = Block(host).eval(), maps()
    want = model(x)
    try:
        merged = merge(copy.deepcopy(model)).eval()
        got = merged(x)
    except (ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        # Not our own: quantised maps in a gate, and the observer that torch leaves out of a norm with a child.
        told = any(word in str(error) for word in ("gate", "quint8", "activation_post_process"))
        if not told:
            raise
        return
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


def test_without_gates_torch_merges_as_ever() -> None:
    model, x = Block().eval(), maps()
    ecanet.remove_gates_(model, force=True)
    want = model(x)
    torch.testing.assert_close(fx_fuse(copy.deepcopy(model))(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_hand(copy.deepcopy(model))(x), want, rtol=1e-4, atol=1e-5)


# The module that torch.fx is given: its graph has no hooks


class OneOperation(nn.Module):
    """Nothing in it but its own code."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1


def interpreted(model: nn.Module) -> Callable[[Tensor], Any]:
    graph = fx.symbolic_trace(model)
    return lambda x: fx.Interpreter(graph).run(x)


def split(model: nn.Module) -> nn.Module:
    from torch.fx.passes.split_module import split_module

    graph = fx.symbolic_trace(model)
    return split_module(graph, model, lambda node: int(node.op == "call_module"))


def prepared(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    return prepare_fx(model, get_default_qconfig_mapping("fbgemm"), (maps(),))


def quantised(model: nn.Module) -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx

    observed = prepared(model)
    observed(torch.linspace(-5, 5, 2 * C * 30).reshape(2, C, 6, 5))
    return convert_fx(observed)


def fused_fx(model: nn.Module) -> nn.Module:
    from torch.ao.quantization.quantize_fx import fuse_fx

    return fuse_fx(model)


def feature_extractor(model: nn.Module) -> Callable[[Tensor], Any]:
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(model, ["gate"])
    return lambda x: extractor(x)["gate"]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(fx.symbolic_trace(model)))


TOOLS: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "symbolic_trace": fx.symbolic_trace,
    "a trace of the trace": lambda model: fx.symbolic_trace(fx.symbolic_trace(model)),
    "a copy of the trace": lambda model: copy.deepcopy(fx.symbolic_trace(model)),
    "a pickle of the trace": pickled,
    "Interpreter": interpreted,
    "Transformer": lambda model: fx.Transformer(fx.symbolic_trace(model)).transform(),
    "split_module": split,
    "fuse": fx_fuse,
    "fuse_fx": fused_fx,
    "prepare_fx": prepared,
    "prepare_fx and convert_fx": quantised,
    "create_feature_extractor": feature_extractor,
    "optimize_for_inference": optimize_for_inference,
    "deepcopy": copy.deepcopy,
    "torch.export": lambda model: torch.export.export(model, (maps(),)).module(),
    "torch.export, strict": lambda model: torch.export.export(model, (maps(),), strict=True).module(),
    "torch.jit.trace": lambda model: torch.jit.trace(model, maps()),
    "functional_call": lambda model: lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x),
}


@pytest.mark.filterwarnings("ignore")  # of what torch deprecates
@pytest.mark.parametrize("root", [Block, OneOperation], ids=["a block", "code without children"])
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_a_gate_on_the_very_module_that_a_tool_is_given_stays(tool, root) -> None:
    model, x = root().eval(), maps()
    ecanet.remove_gates_(model, force=True)
    attach_(model, SEVar1(C))
    with torch.no_grad():
        want = model(x)
        kept = tool(model)
        tolerance = 0.1 if tool is quantised else 1e-5
        torch.testing.assert_close(kept(x), want, rtol=tolerance, atol=tolerance)
        assert torch.equal(model(x), want)


def test_a_trace_of_a_host_has_the_gates_keys_and_parameters() -> None:
    model = OneOperation()
    attach_(model, SE(C))
    traced = fx.symbolic_trace(model)
    assert list(traced.state_dict()) == list(model.state_dict())
    assert list(traced.parameters()) == list(model.parameters())
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["gate"]


def test_a_graph_of_another_method_is_not_scaled() -> None:
    class Features(nn.BatchNorm2d):
        def features(self, x: Tensor) -> Tensor:
            return x * 2

    class FeatureTracer(fx.Tracer):
        traced_func_name = "features"

    model = Features(C)
    attach_(model, ECA(C))
    graph = FeatureTracer().trace(model)
    assert not [node for node in graph.nodes if node.op == "call_module"]


def test_no_gate_hangs_on_a_graph_that_copies_would_lose() -> None:
    with pytest.raises(
        ValueError, match=r"cannot be attached to a GraphModule \(OneOperation\).*name the last module in it"
    ):
        attach_(fx.symbolic_trace(OneOperation()), ECA(C))


@pytest.mark.parametrize("tool", [fx.symbolic_trace, fx_fuse, optimize_for_inference])
def test_what_a_tool_made_of_a_host_takes_its_place_with_one_gate(tool) -> None:
    model, x = nn.Sequential(Block(), nn.ReLU()).eval(), maps()
    ecanet.remove_gates_(model, force=True)
    attach_(model[0], SEVar1(C))
    with torch.no_grad():
        want = model(x)
        model[0] = tool(model[0])
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


# Another module in the place of the one that carries a gate


def group_norm(model: Any) -> nn.Module:
    model.bn = nn.GroupNorm(2, C)
    return model


def frozen_of_torchvision(model: Any) -> nn.Module:
    frozen = FrozenBatchNorm2d(C)
    frozen.load_state_dict(model.bn.state_dict(), strict=False)
    model.add_module("bn", frozen)
    return model


def frozen_of_timm(model: nn.Module) -> nn.Module:
    return pytest.importorskip("timm").layers.freeze_batch_norm_2d(model)


def frozen_and_back(model: nn.Module) -> nn.Module:
    layers = pytest.importorskip("timm").layers
    return layers.unfreeze_batch_norm_2d(layers.freeze_batch_norm_2d(model))


def synchronised_of_timm(model: nn.Module) -> nn.Module:
    return pytest.importorskip("timm").layers.convert_sync_batchnorm(model)


def synchronised(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def wrapped(model: Any) -> nn.Module:
    model.bn = nn.Sequential(model.bn)
    return model


def copied(model: Any) -> nn.Module:
    model.bn = copy.deepcopy(model.bn)
    return model


def rebuilt(model: Any) -> nn.Module:
    new = nn.BatchNorm2d(C)
    new.load_state_dict(model.bn.state_dict(), strict=False)
    model.set_submodule("bn", new)
    return model


REBUILDS: dict[str, Callable[[Any], nn.Module]] = {
    "GroupNorm": group_norm,
    "FrozenBatchNorm2d": frozen_of_torchvision,
    "freeze_batch_norm_2d of timm": frozen_of_timm,
    "freeze and unfreeze": frozen_and_back,
    "convert_sync_batchnorm of timm": synchronised_of_timm,
    "convert_sync_batchnorm": synchronised,
    "a wrapper": wrapped,
    "a copy": copied,
    "a new norm with the old one's values": rebuilt,
}


@pytest.mark.parametrize("rebuild", REBUILDS.values(), ids=REBUILDS)
def test_what_takes_the_place_of_a_host_gets_its_gate_once(rebuild) -> None:
    model, plain, x = Block().eval(), Block().eval(), maps()
    gate = model.bn.gate
    plain.load_state_dict(model.state_dict())
    ecanet.remove_gates_(plain, force=True)
    model, plain = rebuild(model).eval(), rebuild(plain).eval()
    assert sum(attached_gate(m) is not None for m in model.modules()) == 1
    before_act = plain.bn(plain.conv(x))
    torch.testing.assert_close(model(x), torch.relu(gate(before_act)), rtol=1e-5, atol=1e-6)
    assert any(key.startswith("bn.") and "gate" in key for key, _ in model.named_modules())


def test_what_cannot_carry_a_gate_is_told() -> None:
    model = Block()
    with pytest.raises(ValueError, match="a gate cannot be attached to a Sequential"):
        model.bn = nn.Sequential(nn.Identity())
    assert attached_gate(model.bn) is not None


def test_state_dicts_without_gates_load_into_what_took_the_place_of_a_host() -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C))
    plain = model.state_dict()
    insert_gates_(model, where="0")
    model[0] = nn.Conv2d(3, C, 1)
    model.load_state_dict(plain)


# A wrapper around the one that carries a gate


class ConvActHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"init_lora_weights": False}),
    "rsLoRA": ("LoraConfig", {"init_lora_weights": False, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"init_lora_weights": False, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"init_weights": False}),
    "LoKr": ("LoKrConfig", {"init_weights": False}),
    "BOFT": ("BOFTConfig", {"init_weights": False, "boft_block_size": 4}),
    "HRA": ("HRAConfig", {"init_weights": False}),
    "IA3": ("IA3Config", {"init_ia3_weights": False, "feedforward_modules": []}),
}


def adapted(model: nn.Module, name: str) -> Any:
    peft = pytest.importorskip("peft")
    config, arguments = ADAPTERS[name]
    rank = {} if name in ("IA3", "BOFT") else {"r": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, getattr(peft, config)(target_modules=["conv"], **rank, **arguments)).eval()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_a_host_is_gated_with_it_so_that_merging_changes_nothing(name) -> None:
    model, x = ConvActHead().eval(), maps()
    attach_(model.conv, SEVar1(C))
    gate, without = model.conv.gate, model(x)
    plain = ConvActHead().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    adapter = adapted(model, name)
    assert [(host, g) for host, _, g in attached_gates(adapter)] == [("base_model.model.conv", gate)]
    unmerged = adapter(x)
    assert (unmerged - without).abs().max() > 1e-4
    adapter.merge_adapter()
    torch.testing.assert_close(adapter(x), unmerged, rtol=1e-4, atol=1e-5)
    adapter.unmerge_adapter()
    torch.testing.assert_close(adapter(x), unmerged, rtol=1e-4, atol=1e-5)
    merged = adapter.merge_and_unload()
    assert [(host, g) for host, _, g in attached_gates(merged)] == [("conv", gate)]
    assert list(merged.state_dict()) == [
        *(f"conv.{key}" for key in merged.conv.state_dict()),
        "head.weight",
        "head.bias",
    ]
    torch.testing.assert_close(merged(x), unmerged, rtol=1e-4, atol=1e-5)
    plain.load_state_dict(merged.state_dict(), strict=False)
    want = plain.head(plain.act(gate(plain.conv(x))).mean((2, 3)))
    torch.testing.assert_close(merged(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["LoRA", "LoHa", "DoRA"])
def test_an_adapter_that_is_taken_off_unmerged_leaves_the_gate(name) -> None:
    model, x = ConvActHead().eval(), maps()
    attach_(model.conv, SE(C, 2))
    want = model(x)
    adapter = adapted(model, name)
    assert any(key.startswith("base_model.model.conv.gate.") for key in adapter.state_dict())
    back = adapter.unload()
    torch.testing.assert_close(back(x), want)
    assert [host for host, _, _ in attached_gates(back)] == ["conv"]


def test_gates_can_be_put_in_after_adapters_too() -> None:
    model, x = ConvActHead().eval(), maps()
    adapter = adapted(model, "LoRA")
    insert_gates_(adapter, "se", where="*.model.conv", preserve=False, input_shape=(1, C, 6, 5))
    unmerged = adapter(x)
    merged = adapter.merge_and_unload()
    assert [host for host, _, _ in attached_gates(merged)] == ["conv"]
    torch.testing.assert_close(merged(x), unmerged, rtol=1e-4, atol=1e-5)


class Adapter(nn.Module):
    """Adds to what a layer returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.delta = layer, nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.delta(x)


class MergingAdapter(Adapter):
    def merge(self) -> nn.Module:
        self.layer.weight.data[:, :, 1, 1] += self.delta.weight.data[:, :, 0, 0]
        self.layer.bias.data += self.delta.bias.data
        return self.layer


def test_your_own_adapter_that_can_merge_itself_gets_the_gate() -> None:
    model, x = ConvActHead().eval(), maps()
    attach_(model.conv, SEVar1(C))
    modules = dict(model.named_modules())  # somebody's list of them is no other place
    adapter = MergingAdapter(modules["conv"])
    model.conv = adapter
    assert [host for host, _, _ in attached_gates(model)] == ["conv"]
    want = model(x)
    model.conv = adapter.merge()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert attached_gate(adapter) is None


def test_a_wrapper_that_may_add_something_is_told_what_the_gate_scales() -> None:
    model, x = ConvActHead().eval(), maps()
    attach_(model.conv, SEVar1(C))
    host = model.conv
    with pytest.warns(UserWarning, match=r"a Adapter takes the place 'conv'.*scales what the old one returns") as told:
        model.conv = Adapter(host)
    assert told[0].filename == __file__
    torch.testing.assert_close(model.conv(x), host(x) + model.conv.delta(x))


def test_an_adapter_on_a_layer_of_two_places_is_told_that_it_is_not_scaled() -> None:
    model, x = ConvActHead().eval(), maps()
    attach_(model.conv, SEVar1(C))
    model.again = host = model.conv
    want = host(x)
    with pytest.warns(UserWarning, match="also part of something else.*Adapt it without a gate"):
        model.conv = MergingAdapter(host)
    assert torch.equal(model.again(x), want)


class PassesOn(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def checkpointed(layer: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(layer)


def offloaded(layer: nn.Module) -> nn.Module:
    return pytest.importorskip("accelerate").hooks.add_hook_to_module(
        layer, pytest.importorskip("accelerate").hooks.ModelHook()
    )


def kept_to_train(layer: nn.Module) -> nn.Module:
    return pytest.importorskip("peft").utils.ModulesToSaveWrapper(layer, "default")


WRAPPERS = [PassesOn, nn.Sequential, checkpointed, torch.compile, nn.DataParallel, offloaded, kept_to_train]
WRAPPERS += [torch.ao.quantization.QuantWrapper]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_that_only_passes_on_scales_once(wrap) -> None:
    model, x = ConvActHead().eval(), maps()
    attach_(model.conv, SEVar1(C))
    want = model(x)
    model.conv = wrap(model.conv)
    if wrap is not torch.compile:  # not compiled here: it would call the same
        torch.testing.assert_close(model(x), want)


# Our own copy for inference


@pytest.mark.parametrize("host", ["", "bn", "conv", "act"])
def test_the_copy_for_inference_keeps_the_gate_wherever_it_hangs(host) -> None:
    model, x = Block().eval(), maps()
    ecanet.remove_gates_(model, force=True)
    attach_(model.get_submodule(host), ECA(C))
    fast = optimize_for_inference(model)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(m, ECA) for m in fast.modules()) == 1


@pytest.mark.parametrize("part", ["layer1.1", "layer2", "layer3.0", "layer4.1", "layer4"])
def test_a_part_of_a_network_is_optimised_with_the_gate_that_hangs_on_it(part) -> None:
    model = resnet18(num_classes=4).eval()
    if part in ("layer2", "layer4"):
        insert_gates_(model, "se", where="stage", preserve=False)
    else:
        insert_gates_(model, "se", where=part, preserve=False)
    module = model.get_submodule(part)
    channels = next(m.num_features for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    if part in ("layer2", "layer3.0", "layer4"):
        channels //= 2
    x = torch.randn(2, channels, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(optimize_for_inference(module)(x), module(x), rtol=1e-3, atol=1e-4)


# replace_gates_


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "kwargs", "always", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("network", ["inserted", "its own"])
def test_hooks_on_a_gate_go_on_to_the_one_that_takes_its_place(network, kind) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), SE(C, 2) if network == "its own" else nn.ReLU())
    if network == "inserted":
        insert_gates_(model, "se", where="1", preserve=False)
    name = "2" if network == "its own" else "1.gate"
    seen: list[str] = []
    old = model.get_submodule(name)
    handle = {
        "forward": lambda: old.register_forward_hook(lambda m, a, y: seen.append(type(m).__name__)),
        "forward_pre": lambda: old.register_forward_pre_hook(lambda m, a: seen.append(type(m).__name__)),
        "kwargs": lambda: old.register_forward_hook(lambda m, a, k, y: seen.append(type(m).__name__), with_kwargs=True),
        "always": lambda: old.register_forward_hook(lambda m, a, y: seen.append(type(m).__name__), always_call=True),
        "full_backward": lambda: old.register_full_backward_hook(lambda m, i, o: seen.append(type(m).__name__)),
        "full_backward_pre": lambda: old.register_full_backward_pre_hook(lambda m, o: seen.append(type(m).__name__)),
    }[kind]()
    report = replace_gates_(model, "eca")
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    assert seen == ["ECA"]
    handle.remove()
    model(x).sum().backward()
    assert seen == ["ECA"]
    replace_gates_(model, report.replaced)
    assert model.get_submodule(name) is old


def test_hooks_on_the_host_keep_their_order_when_its_gate_is_swapped() -> None:
    norm, seen = nn.BatchNorm2d(C).eval(), []
    model = nn.Sequential(nn.Conv2d(3, C, 1), norm)
    norm.register_forward_hook(lambda m, a, y: seen.append(("before", y.mean().item())))
    insert_gates_(model, "se_var2", where="1", preserve=False)
    norm.register_forward_hook(lambda m, a, y: seen.append(("after", y.mean().item())))
    replace_gates_(model, "eca")
    x = torch.randn(2, 3, 6, 6)
    y = model(x)
    assert [place for place, _ in seen] == ["before", "after"]
    assert seen[1][1] == y.mean().item() != seen[0][1]


def test_hooks_that_cannot_move_are_told() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C))
    insert_gates_(model, "se", where="1", preserve=False)
    model[1].gate.fc1.register_forward_hook(lambda m, a, y: None)
    report = replace_gates_(model, "se_var2")
    assert any("left behind" in note and "fc1" in note for note in report.notes)
    prune.random_unstructured(model[1].gate, "weight", amount=0.5)
    report = replace_gates_(model, "eca")
    assert any("left behind" in note and "weights" in note for note in report.notes)
    model(torch.randn(2, 3, 6, 6))


# Structured pruning


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def test_structured_pruning_leaves_the_maps_that_gates_scale() -> None:
    pruning = pytest.importorskip("torch_pruning")
    model: Any = nn.Sequential(nn.Conv2d(3, C, 3), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 2))
    x = torch.randn(2, 3, 8, 8)
    insert_gates_(model.eval())
    importance = pruning.importance.MagnitudeImportance(p=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruning.pruner.MagnitudePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model[4]]).step()
    assert model[1].conv1.out_channels == C // 2
    assert model[1].bn2.num_features == model[1].bn2.gate.channels == C
    assert model(x).isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_a_network_that_was_pruned_by_hand_says_that_its_gate_has_another_size(training, backend) -> None:
    model = Block().train(training)
    model.conv.weight.data, half = model.conv.weight.data[: C // 2], C // 2
    bn = model.bn
    bn.num_features = half
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(bn, name).data = getattr(bn, name).data[:half]
    with ecanet.backend(backend), pytest.raises(ValueError, match=rf"built for {C}: build it with channels={half}"):
        model(maps())


def test_fx_graphs_of_other_tools_keep_the_gate() -> None:
    model, x = Block().eval(), maps()
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


class Merges(nn.Module):
    """As YOLO's Conv and RepVGG's blocks do, it can become one convolution."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU()
        setattr(self, how, lambda: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


@pytest.mark.parametrize("how", ["forward_fuse", "reparameterize", "switch_to_deploy"])
@pytest.mark.parametrize("place", ["1.bn", "1.conv", "1.act", "*.bn"])
def test_no_gate_goes_inside_what_merges_its_layers_later(place, how) -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 1), Merges(how))
    with pytest.raises(ValueError, match=r"would be lost when 1 merges its layers.*name 1"):
        insert_gates_(model, where=place)
    assert not any("gate" in name for name, _ in model.named_modules())
    assert [row.where for row in insert_gates_(model, where="1").rows] == ["1"]


def test_what_lives_elsewhere_too_gets_no_gate_and_that_is_told() -> None:
    teacher, student = (nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval() for _ in range(2))
    attach_(student[1], ECA(8))
    x = torch.randn(2, 8, 4, 4)
    want = teacher(x)
    with pytest.warns(UserWarning, match="takes the place '1' of a BatchNorm2d that a gate is attached to"):
        student[1] = teacher[1]
    assert torch.equal(teacher(x), want)


def test_modules_that_change_places_take_their_gates_along() -> None:
    norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])
    attach_(norms[0], ECA(8))
    norms[0], norms[2] = norms[2], norms[0]
    assert [name for name, _, _ in attached_gates(norms)] == ["2"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_networks_without_gates_are_built_and_merged_as_without_this_library() -> None:
    """TorchScript keeps its children in something of its own; merging functions take their arguments by name."""
    block = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), torch.jit.script(nn.ReLU()))
    model[1] = nn.ReLU()
    merged = torch.nn.utils.fusion.fuse_conv_bn_eval(conv=block[0], bn=block[1])
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(merged(x), block(x), rtol=1e-4, atol=1e-5)


def merging(how: str) -> nn.Module:
    """Two branches beside each other that become one convolution."""

    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.thin = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.thin(x)

    setattr(Merging, how, lambda self: None)
    return Merging()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x))


@pytest.mark.parametrize("how", ["forward_fuse", "reparameterize", "switch_to_deploy"])
@pytest.mark.parametrize("where", ["conv", "block", "stage"])
def test_what_merges_its_layers_later_is_left_out_and_the_rest_is_not(where, how) -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), nn.Sequential(nn.Identity(), merging(how)), Plain()
    )
    report = insert_gates_(model, where=where)
    assert [row.where for row in report.rows] == {"conv": ["0.1"], "block": ["2.bn"], "stage": ["2"]}[where]
    assert any("1.1: it can merge its layers" in note for note in report.notes), report.notes


@pytest.mark.parametrize("how", ["forward_fuse", "reparameterize", "switch_to_deploy"])
def test_a_group_that_merges_its_norm_later_gets_its_gate_behind_it(how) -> None:
    class ConvNormAct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)))

    setattr(ConvNormAct, how, lambda self: None)
    assert [row.where for row in insert_gates_(nn.Sequential(ConvNormAct()), where="conv").rows] == ["0"]


def with_state_dict_hook(gate: nn.Module) -> None:
    gate.register_state_dict_post_hook(lambda module, state, prefix, meta: None)


def with_state_dict_pre_hook(gate: nn.Module) -> None:
    gate.register_state_dict_pre_hook(lambda module, prefix, keep: None)


def with_load_pre_hook(gate: nn.Module) -> None:
    gate.register_load_state_dict_pre_hook(lambda *args: None)


def with_load_post_hook(gate: nn.Module) -> None:
    gate.register_load_state_dict_post_hook(lambda module, keys: None)


def with_forward(gate: nn.Module) -> None:
    gate.forward = lambda x: x


def with_logits(gate: nn.Module) -> None:
    gate.logits = lambda s: s


def frozen(gate: nn.Module) -> None:
    gate.requires_grad_(False)


LEFT = {
    "a hook on state dicts": (with_state_dict_hook, "hooks on state dicts"),
    "a hook before state dicts": (with_state_dict_pre_hook, "hooks on state dicts"),
    "a hook before loading": (with_load_pre_hook, "hooks on state dicts"),
    "a hook after loading": (with_load_post_hook, "hooks on state dicts"),
    "a forward of its own": (with_forward, "the forward that "),
    "logits of its own": (with_logits, "the logits that "),
    "frozen": (frozen, "was frozen"),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("make", [lambda: SE(C, 2), lambda: ecanet.nn.SEVar2(C)], ids=["SE", "SE-Var2"])
def test_what_the_new_gate_does_not_have_of_the_old_one_is_told(make, name) -> None:
    change, says = LEFT[name]
    model = nn.Sequential(nn.Conv2d(3, C, 1), make())
    change(model[1])
    notes = replace_gates_(model, "eca").notes
    assert [says in note and " 1" in note for note in notes] == [True], notes


@pytest.mark.parametrize("gate", ["eca", "se", "se_var2"])
def test_of_a_gate_that_nobody_changed_nothing_is_told(gate) -> None:
    model = Block()
    assert replace_gates_(model, gate).notes == ()
    assert replace_gates_(model, "se_var3").notes == ()
