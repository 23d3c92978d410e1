"""What people do to the layers inside a gate is obeyed: adapters, other layers, hooks, masks, quantised weights."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from ecanet.nn import ECA, ECANS, SE, Gate, SEVar2, norm_gate_add_act
from ecanet.ops import reference

C = 16
SHAPE = (3, C, 5, 4)


def layers_of(gate: Gate) -> list[str]:
    """Names of the layers that a gate holds."""
    return [name for name, child in gate.named_modules() if isinstance(child, (nn.Conv1d, nn.Linear))]


def change(gate: Gate, make: Callable[[Any], nn.Module]) -> None:
    """Put something else in the place of each layer."""
    for name in layers_of(gate):
        setattr(gate, name, make(getattr(gate, name)))


class OwnForward:
    """A subclass of a layer that does more than the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x) + 0.1  # type: ignore[misc]


class OwnConv(OwnForward, nn.Conv1d):
    pass


class OwnLinear(OwnForward, nn.Linear):
    pass


def own_forward(gate: Gate) -> None:
    for name in layers_of(gate):
        layer = getattr(gate, name)
        layer.__class__ = OwnConv if isinstance(layer, nn.Conv1d) else OwnLinear


def forward_of_the_instance(gate: Gate) -> None:
    for name in layers_of(gate):
        layer = getattr(gate, name)
        layer.forward = lambda x, layer=layer: 2 * type(layer).forward(layer, x)


def with_bias(gate: Gate) -> None:
    for name in layers_of(gate):
        layer = getattr(gate, name)
        layer.bias = nn.Parameter(torch.randn(len(layer.weight)).to(layer.weight))


class Scaled(nn.Module):
    """An adapter that wraps a layer, as LoRA does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.strength = nn.Parameter(torch.full((), 1.5, dtype=next(layer.parameters()).dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.strength * self.layer(x)


def another_dilation(gate: Gate) -> None:
    if isinstance(gate, ECA):
        old = gate.conv
        gate.conv.dilation, gate.conv.padding = (2,), (2 * old.padding[0],)
        if gate.circular:  # such a layer has read its padding when it was made
            gate.conv = nn.Conv1d(1, 1, 3, padding=2, dilation=2, padding_mode="circular", bias=False).double()
    else:
        change(gate, lambda layer: nn.Sequential(nn.Tanh(), layer))


def another_padding(gate: Gate) -> None:
    if isinstance(gate, ECA):
        old = gate.conv
        gate.conv = nn.Conv1d(1, 1, old.kernel_size, padding=old.padding, padding_mode="reflect", bias=False).double()
    else:
        change(gate, lambda layer: nn.Sequential(layer, nn.LeakyReLU(0.3)))


def a_longer_kernel(gate: Gate) -> None:
    if isinstance(gate, ECA):
        gate.conv = nn.Conv1d(1, 1, 7, padding=3, bias=False).double()
    else:
        gate.fc1, gate.fc2 = nn.Linear(C, 5, bias=False).double(), nn.Linear(5, C, bias=False).double()


class Negated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def parametrised(gate: Gate) -> None:
    for name in layers_of(gate):
        nn.utils.parametrize.register_parametrization(getattr(gate, name), "weight", Negated())


def weight_norm(gate: Gate) -> None:
    for name in layers_of(gate):
        parametrizations.weight_norm(getattr(gate, name))


def pruned(gate: Gate) -> None:
    for name in layers_of(gate):
        prune.random_unstructured(getattr(gate, name), "weight", amount=0.4)


def a_hook_that_changes_the_output(gate: Gate) -> None:
    for name in layers_of(gate):
        getattr(gate, name).register_forward_hook(lambda layer, args, out: 3 * out)


def a_hook_that_changes_the_input(gate: Gate) -> None:
    for name in layers_of(gate):
        getattr(gate, name).register_forward_pre_hook(lambda layer, args: (args[0].sin(),))


class Tripled(Tensor):
    """A weight with operations of its own, as quantised and sharded ones are."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.linear, F.conv1d, torch.conv1d):
            return function(args[0], 3 * args[1].as_subclass(Tensor), *args[2:])
        return super().__torch_function__(function, types, args, kwargs)


def a_weight_of_another_class(gate: Gate) -> None:
    for name in layers_of(gate):
        layer = getattr(gate, name)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tripled))


def logits_of_the_instance(gate: Gate) -> None:
    weight = nn.Parameter(torch.randn(C, dtype=torch.float64))
    gate.extra = nn.ParameterList([weight])
    gate.logits = lambda s: s * weight + 0.1  # type: ignore[method-assign]


def gate_of_the_instance(gate: Gate) -> None:
    gate.gate = lambda s: s.exp()  # type: ignore[method-assign]


CHANGES = {
    "a subclass with its own forward": own_forward,
    "a forward of the instance": forward_of_the_instance,
    "a bias": with_bias,
    "an adapter around it": lambda gate: change(gate, Scaled),
    "another dilation or input": another_dilation,
    "another padding or output": another_padding,
    "another size": a_longer_kernel,
    "parametrised": parametrised,
    "weight norm": weight_norm,
    "pruned": pruned,
    "a hook on what comes out": a_hook_that_changes_the_output,
    "a hook on what goes in": a_hook_that_changes_the_input,
    "a weight of another class": a_weight_of_another_class,
    "logits of the instance": logits_of_the_instance,
    "a gate of the instance": gate_of_the_instance,
}
GATES = {"eca": lambda: ECA(C), "circular eca": lambda: ECA(C, circular=True), "se": lambda: SE(C, 4)}
every_change = pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
every_gate = pytest.mark.parametrize("make", GATES.values(), ids=GATES)


def by_calling(gate: Any, x: Tensor) -> Tensor:
    """The gate, written as its equation is: every layer is called."""
    s = x.mean((2, 3))
    own = vars(gate)
    if "gate" in own:
        g = gate.gate(s)
    elif "logits" in own:
        g = gate.factor * torch.sigmoid(gate.logits(s))
    elif isinstance(gate, ECA):
        g = gate.factor * torch.sigmoid(gate.conv(s[:, None])[:, 0])
    else:
        g = gate.factor * torch.sigmoid(gate.fc2(torch.relu(gate.fc1(s))))
    return x * g[:, :, None, None]


def assert_alike(got: Tensor, want: Tensor, inputs: list[Tensor], tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    dout = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True):
        torch.testing.assert_close(g, w, rtol=10 * tolerance, atol=10 * tolerance)


@every_change
@every_gate
def test_a_gate_computes_what_its_layers_compute(make, changed) -> None:
    gate, x = make().double(), torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    gate.factor = 2.0
    changed(gate)
    used = [p for name, p in gate.named_parameters() if not (vars(gate).keys() & {"gate", "logits"}) or "extra" in name]
    assert_alike(gate(x), by_calling(gate, x), [x, *used])
    with torch.no_grad():
        torch.testing.assert_close(gate(x), by_calling(gate, x), rtol=1e-11, atol=1e-11)


@every_change
@every_gate
def test_a_tail_computes_what_the_layers_of_its_gate_compute(make, changed) -> None:
    gate, norm = make().double(), nn.BatchNorm2d(C).double()
    x, residual = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    x.requires_grad_()
    changed(gate)
    used = [p for name, p in gate.named_parameters() if not (vars(gate).keys() & {"gate", "logits"}) or "extra" in name]
    want = torch.relu(by_calling(gate, copy.deepcopy(norm)(x)) + residual)
    assert_alike(norm_gate_add_act(x, norm, gate, residual, "relu"), want, [x, *used])


@pytest.mark.parametrize("make", [*GATES.values(), lambda: ECANS(C), lambda: SEVar2(C)])
def test_plain_layers_stay_in_the_fused_tail(make) -> None:
    gate = make()
    assert gate.maths() is not None
    assert [id(p) for p in gate.maths().parameters] == [id(p) for p in gate.parameters()]


@pytest.mark.parametrize("place", ["gate", "tail", "evaluation"])
@every_gate
def test_backward_hooks_of_inner_layers_fire_once(make, place) -> None:
    gate, seen = make().double(), []
    for name in layers_of(gate):
        getattr(gate, name).register_full_backward_hook(lambda layer, gi, go: seen.append((gi[0].shape, go[0].shape)))
        getattr(gate, name).register_full_backward_pre_hook(lambda layer, go: seen.append(go[0].shape))
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    norm = nn.BatchNorm2d(C).double().train(place != "evaluation")
    out = gate(x) if place == "gate" else norm_gate_add_act(x, norm, gate, x, "relu")
    out.sum().backward()
    assert len(seen) == 2 * len(layers_of(gate))


@contextmanager
def a_hook_on_all_modules(seen: list[str]) -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    try:
        yield
    finally:
        handle.remove()


@every_gate
def test_a_hook_on_all_modules_sees_the_inner_layers(make) -> None:
    gate, seen = make(), []
    with a_hook_on_all_modules(seen):
        gate(torch.randn(SHAPE))
    assert seen == [*(type(getattr(gate, name)).__name__ for name in layers_of(gate)), type(gate).__name__]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@every_gate
def test_called_layers_get_the_type_of_their_weights(make, dtype, autocast) -> None:
    gate, x = make().to(dtype), torch.randn(SHAPE, dtype=dtype)
    seen: list[torch.dtype] = []
    for name in layers_of(gate):
        getattr(gate, name).register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=dtype) if autocast else nullcontext():
        assert gate(x).dtype == dtype
    assert set(seen) == {dtype}


def test_an_empty_batch_goes_through_called_layers() -> None:
    gate, x = SE(C, 4), torch.randn(0, C, 3, 3, requires_grad=True)
    with_bias(gate)
    gate(x).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(gate.fc1.bias.grad, torch.zeros_like(gate.fc1.bias))


@every_change
@every_gate
def test_a_gate_of_other_layers_is_never_taken_for_a_constant_it_is_not(make, changed) -> None:
    gate = make().double()
    gate.make_neutral_()
    assert gate.constant() == 0.5
    changed(gate)
    constant = gate.constant()
    if constant is not None:
        g = gate.gate(torch.randn(4, C, dtype=torch.float64))
        torch.testing.assert_close(g, torch.full_like(g, constant), rtol=1e-12, atol=0)


@every_change
@every_gate
def test_only_weights_that_can_take_back_a_factor_are_offered(make, changed) -> None:
    gate, s = make().double(), torch.randn(4, C, dtype=torch.float64)
    changed(gate)
    before, weights = gate.gate(s), gate.weights_on_means()
    if not weights or vars(gate).keys() & {"gate", "logits"}:
        return
    with torch.no_grad():
        for weight in weights:
            weight /= 2
    torch.testing.assert_close(gate.gate(2 * s), before, rtol=1e-12, atol=1e-12)


# The tools themselves.


def test_lora_of_peft_learns_inside_squeeze_and_excitation() -> None:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(C), "gate": SE(C, 4)}).double().requires_grad_(False)
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False), model
    ).double()
    gate, norm, x = model["gate"], model["norm"], torch.randn(SHAPE, dtype=torch.float64)
    learnt = [p for p in gate.parameters() if p.requires_grad]
    assert len(learnt) == 4
    want = torch.relu(by_calling(gate, copy.deepcopy(norm)(x)))
    assert_alike(norm_gate_add_act(x, norm, gate, None, "relu"), want, learnt)
    assert_alike(gate(x), by_calling(gate, x), learnt)
    merged = copy.deepcopy(gate)
    for layer in (merged.fc1, merged.fc2):
        layer.merge()
    torch.testing.assert_close(merged(x), gate(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "OFT", "IA3", "BOFT"])
def test_other_adapters_of_peft_have_their_effect(kind, monkeypatch) -> None:
    peft = pytest.importorskip("peft")
    for name in ("CC", "CXX"):  # BOFT sets them and, where nothing can be compiled, leaves them so
        monkeypatch.setenv(name, os.environ.get(name, ""))
    settings: dict[str, dict[str, Any]] = {
        "LoHa": {"r": 2, "init_weights": False},
        "LoKr": {"r": 2, "init_weights": False},
        "OFT": {"r": 0, "oft_block_size": 4, "init_weights": False},
        "IA3": {"feedforward_modules": [], "init_ia3_weights": False},
        "BOFT": {"boft_block_size": 4, "init_weights": False},
    }
    config = getattr(peft, f"{kind}Config")(target_modules=["fc2", "fc1"], **settings[kind])
    model = nn.ModuleDict({"gate": SE(C, 4)})
    plain, x = copy.deepcopy(model["gate"]), torch.randn(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers that BOFT would like to have
        gate = peft.inject_adapter_in_model(config, model)["gate"]
        with torch.no_grad():  # away from where an adapter starts, which may be the identity
            for p in (p for p in gate.parameters() if p.requires_grad):
                p.add_(0.3 * torch.randn_like(p))
        gate.eval()
        torch.testing.assert_close(gate(x), by_calling(gate, x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(gate(x), plain(x), rtol=1e-4)


def test_dynamic_quantisation_of_squeeze_and_excitation_runs() -> None:
    gate, norm, x = SE(C, 4), nn.BatchNorm2d(C).eval(), torch.randn(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao
        quantised = torch.ao.quantization.quantize_dynamic(gate.eval(), {nn.Linear}, torch.qint8)
    assert type(quantised.fc1) is not nn.Linear
    assert quantised.constant() is None
    with torch.no_grad():
        torch.testing.assert_close(quantised(x), by_calling(quantised, x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quantised(x), gate(x), rtol=0.05, atol=0.05)
        got = norm_gate_add_act(x, norm, quantised, x, "relu")
        torch.testing.assert_close(got, torch.relu(by_calling(quantised, norm(x)) + x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_quantises_squeeze_and_excitation(kind) -> None:
    pytest.importorskip("torchao")
    from torchao import quantization

    gate, x = SE(64, 4).eval(), torch.randn(3, 64, 5, 4)
    quantised = copy.deepcopy(gate)
    quantization.quantize_(quantised, getattr(quantization, kind)())
    assert type(quantised.fc1.weight) is not nn.Parameter
    with torch.no_grad():
        torch.testing.assert_close(quantised(x), by_calling(quantised, x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(quantised(x), gate(x), rtol=0.05, atol=0.05)
        norm = nn.BatchNorm2d(64).eval()
        got = norm_gate_add_act(x, norm, quantised, x, "relu")
        torch.testing.assert_close(got, torch.relu(by_calling(quantised, norm(x)) + x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_accelerate_brings_weights_of_gates_in_when_they_are_called(offload, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), SE(C, 4), ECA(C)).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        want = model(x)
        arguments = {"offload_dir": str(tmp_path)} if offload == "disk_offload" else {}
        getattr(accelerate, offload)(model, execution_device="cpu", **arguments)
        assert model[2].fc1.weight.is_meta
        torch.testing.assert_close(model(x), want)


def test_half_precision_reference_of_a_called_layer() -> None:
    gate, x = ECA(C).half(), torch.randn(SHAPE).half()
    with_bias(gate)
    s = reference.squeeze(x, C)
    want = torch.sigmoid(F.conv1d(s.half()[:, None], gate.conv.weight, gate.conv.bias, padding=1)[:, 0].float())
    torch.testing.assert_close(gate.gate(s), want)


class Shifted(ECA):
    def scaled(self, g: torch.Tensor) -> torch.Tensor:
        return 1 + g


@pytest.mark.parametrize("how", ["in a subclass", "on the instance", "on the class"])
def test_what_is_made_of_the_sigmoid_counts(how, monkeypatch) -> None:
    gate = Shifted(8) if how == "in a subclass" else ECA(8)
    if how == "on the instance":
        gate.scaled = lambda g: 1 + g
    elif how == "on the class":
        monkeypatch.setattr(ECA, "logits", lambda self, s: s + 3)
    x = torch.randn(2, 8, 4, 4)
    want = x * gate.gate(x.mean((2, 3)))[:, :, None, None]
    torch.testing.assert_close(gate(x), want)
    torch.testing.assert_close(norm_gate_add_act(x, None, gate, x, "relu"), torch.relu(want + x))
