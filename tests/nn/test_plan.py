"""Who computes a tail, in every situation of the table in docs/how-it-works.md; decided once, and said in one line."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import ecanet
from ecanet.nn import CBAM, ECA, SE, explain, norm_gate_add_act
from ecanet.nn.tail import plan as plans
from ecanet.nn.tail.shared_norm import _SharedForward
from ecanet.ops import backend, gpu
from tests.kernels_here import needs_kernels

C = 8
DOCS = Path(__file__).parents[2] / "docs/how-it-works.md"


def arguments(**changed: Any) -> dict[str, Any]:
    """A tail that the kernels know, with something else in it."""
    x = torch.randn(2, C, 3, 4)
    return {
        "x": x,
        "norm": nn.BatchNorm2d(C),
        "gate": ECA(C),
        "residual": torch.randn_like(x),
        "act": "relu",
        **changed,
    }


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def with_attached_gate() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
    ecanet.insert_gates_(model, where=["1"], input_shape=(1, C, 3, 4))
    return model[1]


#: Name in the docs: what is passed, and what the line says before the reason, and a part of the reason.
EAGER: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "BatchNorm and a gate of this library": (arguments, "the C++ kernels (norm, gate, residual, relu)", "on the CPU"),
    "neither norm nor gate, gradients on": (
        lambda: arguments(norm=None, gate=None),
        "the modules (residual, relu)",
        "keep less for the backward",
    ),
    "no gate": (lambda: arguments(gate=None), "the C++ kernels (norm, residual, relu)", "on the CPU"),
    "a gate that is attached to the norm": (
        lambda: arguments(norm=with_attached_gate(), gate=None),
        "the C++ kernels (norm, gate, residual, relu)",
        "on the CPU",
    ),
    "another norm": (
        lambda: arguments(norm=nn.GroupNorm(2, C)),
        "the C++ kernels (gate, residual, relu); called: norm",
        ", not a BatchNorm of torch",
    ),
    "a hook on the norm": (
        lambda: arguments(norm=hooked(nn.BatchNorm2d(C))),
        "the C++ kernels (gate, residual, relu); called: norm",
        "the norm is called: it has a hook",
    ),
    "a hook on a norm that a gate is attached to": (
        lambda: arguments(norm=hooked(with_attached_gate()), gate=None),
        "the modules (norm, gate, residual, relu)",
        "the norm is called: it has a hook",
    ),
    "a gate from another library": (
        lambda: arguments(gate=nn.Identity()),
        "the C++ kernels (norm); called: gate; afterwards: residual, relu",
        "the gate is called: it is an Identity, not a Gate of this library",
    ),
    "a gate of the map itself: CBAM, SimAM": (
        lambda: arguments(gate=CBAM(C)),
        "the C++ kernels (norm); called: gate; afterwards: residual, relu",
        "the gate is called: it needs more of the map than means and variances",
    ),
    "a hook on the gate": (
        lambda: arguments(gate=hooked(SE(C))),
        "the C++ kernels (norm); called: gate; afterwards: residual, relu",
        "the gate is called: it has a hook",
    ),
    "a residual that is broadcast, or of another type": (
        lambda: arguments(residual=torch.randn(C, 1, 1)),
        "the C++ kernels (norm, gate); afterwards: residual, relu",
        "on the CPU",
    ),
    "another activation": (
        lambda: arguments(act=nn.GELU()),
        "the C++ kernels (norm, gate, residual); afterwards: GELU",
        "on the CPU",
    ),
    "an empty batch": (
        lambda: arguments(x=torch.randn(0, C, 3, 4), residual=None),
        "the modules (norm, gate, relu)",
        "x is empty",
    ),
    "a tensor subclass": (
        lambda: arguments(x=torch.randn(2, C, 3, 4).as_subclass(OwnTensor)),
        "the modules (norm, gate, residual, relu)",
        "x is a OwnTensor",
    ),
}


class OwnTensor(torch.Tensor):
    """Sees every operation."""


COMPILED: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "compiled: ECA, statistics of the batch": (
        arguments,
        "one operation in a compiler's graph (norm, gate, residual, relu)",
        "the kernels are faster",
    ),
    "compiled: ECA, given statistics, no gradient": (
        lambda: arguments(norm=nn.BatchNorm2d(C).eval()),
        "one operation in a compiler's graph (norm, gate, residual, relu)",
        "the kernels are faster",
    ),
    "compiled: another gate, statistics of the batch": (
        lambda: arguments(gate=SE(C)),
        "a formula in a compiler's graph (norm, gate, residual); afterwards: relu",
        "Inductor fuses it",
    ),
    "compiled: no gate": (
        lambda: arguments(gate=None),
        "the modules (norm, residual, relu)",
        "a compiler fuses the rest as well",
    ),
    "compiled: a hooked norm or gate, or another that has to be called": (
        lambda: arguments(norm=hooked(nn.BatchNorm2d(C))),
        "the modules (norm, gate, residual, relu)",
        "the norm is called: it has a hook",
    ),
    "compiled: an empty batch": (
        lambda: arguments(x=torch.randn(0, C, 3, 4), residual=None),
        "the modules (norm, gate, relu)",
        "x is empty",
    ),
    "compiled: SyncBatchNorm": (
        lambda: arguments(norm=nn.SyncBatchNorm(C)),
        "the modules (norm, gate, residual, relu)",
        "the norm is called: torch.compile gets torch's SyncBatchNorm with its collectives",
    ),
}
Build = Callable[[], nn.Module]
#: Name in the docs: type of x, norm and gate, who computes on the CPU, and on a GPU.
ON_CPU_AND_GPU: dict[str, tuple[torch.dtype, Build | None, nn.Module, str, str]] = {
    "compiled: another gate, given statistics": (
        torch.float32,
        lambda: nn.BatchNorm2d(C).eval(),
        SE(C),
        "the modules (norm, gate, relu)",
        "a formula in a compiler's graph (norm, gate, relu)",
    ),
    "compiled: ECA, given statistics, with a gradient": (
        torch.float32,
        lambda: nn.BatchNorm2d(C).eval(),
        ECA(C),
        "the modules (norm, gate, relu)",
        "a formula in a compiler's graph (norm, gate, relu)",
    ),
    "compiled: a gate without a norm": (
        torch.float32,
        None,
        ECA(C),
        "the modules (gate, relu)",
        "a formula in a compiler's graph (gate, relu)",
    ),
    "compiled: half precision on a GPU": (
        torch.float16,
        lambda: nn.BatchNorm2d(C),
        ECA(C),
        "one operation in a compiler's graph (norm, gate, relu)",
        "one operation in a compiler's graph (norm, gate, relu)",
    ),
}
LOOKING_ON = (
    "torch.fx, torch.jit.trace or torch.func traces the call",
    "forward-mode derivatives are taken",
    "the reference is asked for",
)


@needs_kernels
@pytest.mark.parametrize("name", EAGER)
def test_who_computes_and_why(name) -> None:
    build, line, why = EAGER[name]
    said = explain(**build())
    assert said.startswith(f"{line}: ")
    assert why in said


@needs_kernels
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a hook on a norm that a gate is attached to", "the C++ kernels (residual, relu); called: norm, gate"),
        ("a gate from another library", "the C++ kernels (norm, residual, relu); called: gate"),
        ("a hook on the gate", "the C++ kernels (norm, residual, relu); called: gate"),
    ],
)
def test_without_gradients_the_kernels_add_and_activate_after_a_gate_that_is_called(name, line) -> None:
    build, with_gradients, _ = EAGER[name]
    given = build()
    with torch.no_grad():
        assert explain(**given).startswith(f"{line}: ")
    assert explain(**given).startswith(f"{with_gradients}: ")


def without_forward(module: nn.Module) -> nn.Module:
    vars(module)["forward"] = module.forward
    return module


class BatchNormWithItsOwnCall(nn.BatchNorm2d):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().__call__(x)


class GateWithItsOwnCall(ECA):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().__call__(x)


class GateWithItsOwnForward(ECA):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_tensor(norm: nn.Module, name: str, tensor: Any) -> nn.Module:
    setattr(norm, name, nn.Parameter(tensor) if name in ("weight", "bias") else tensor)
    return norm


#: What is passed, and why it is called, to the end of the line.
REASONS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a forward of an instance": (
        lambda: arguments(norm=without_forward(nn.BatchNorm2d(C))),
        "the norm is called: it has a forward of its own, not its class's",
    ),
    "a parametrized norm": (
        lambda: arguments(norm=nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(C), "weight", nn.Tanh())),
        "the norm is called: it is parametrized: its weight or bias is computed from other tensors",
    ),
    "a subclass of a norm": (
        lambda: arguments(norm=BatchNormWithItsOwnCall(C)),
        "the norm is called: it is a BatchNormWithItsOwnCall, whose __call__ is not torch's",
    ),
    "a norm of another kind": (
        lambda: arguments(norm=nn.InstanceNorm2d(C)),
        "the norm is called: it is an InstanceNorm2d, not a BatchNorm of torch",
    ),
    "a gate with its own call": (
        lambda: arguments(gate=GateWithItsOwnCall(C)),
        "the gate is called: it is a GateWithItsOwnCall, whose __call__ is not torch's",
    ),
    "a gate with its own forward": (
        lambda: arguments(gate=GateWithItsOwnForward(C)),
        "the gate is called: it is a GateWithItsOwnForward, whose forward is not that of a Gate",
    ),
    "statistics of another size": (
        lambda: arguments(norm=with_tensor(nn.BatchNorm2d(C), "running_mean", torch.zeros(C + 1))),
        f"the norm is called: it has a tensor of shape ({C + 1},) on cpu, not ({C},) on cpu",
    ),
    "statistics elsewhere": (
        lambda: arguments(norm=with_tensor(nn.BatchNorm2d(C), "running_var", torch.zeros(C, device="meta"))),
        f"the norm is called: it has a tensor of shape ({C},) on meta, not ({C},) on cpu",
    ),
    "a weight with operations of its own": (
        lambda: arguments(norm=with_tensor(nn.BatchNorm2d(C), "weight", torch.ones(C).as_subclass(OwnTensor))),
        "the norm is called: it has a OwnTensor, which sees every operation",
    ),
    "no eps": (
        lambda: arguments(norm=nn.BatchNorm2d(C, eps=0.0)),
        "the norm is called: it has an eps of 0.0, which torch may refuse",
    ),
}


@needs_kernels
@pytest.mark.parametrize("name", REASONS)
def test_the_reason_why_a_module_is_called_says_what_it_is(name) -> None:
    build, why = REASONS[name]
    assert explain(**build()).endswith(why)


@needs_kernels
def test_a_hook_on_all_modules_is_not_said_to_be_the_norms() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "the norm is called: it is seen by a hook on all modules" in explain(**arguments())
    finally:
        handle.remove()


@needs_kernels
@pytest.mark.parametrize("name", COMPILED)
def test_who_computes_under_a_compiler_and_why(name) -> None:
    build, line, why = COMPILED[name]
    with torch.no_grad():
        said = explain(**build(), compiled=True)
    assert said.startswith(f"{line}: ")
    assert why in said


@needs_kernels
@pytest.mark.parametrize("name", ON_CPU_AND_GPU)
def test_who_computes_under_a_compiler_on_either_device(name, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "IS_COMPLETE", True)
    dtype, norm, gate, *lines = ON_CPU_AND_GPU[name]
    for device, line in zip(("cpu", "cuda"), lines, strict=True):
        with FakeTensorMode(), torch.device(device), torch.set_grad_enabled("gradient" in name):
            x = torch.empty(2, C, 3, 4, dtype=dtype)
            said = explain(x, None if norm is None else norm(), gate, act="relu", compiled=True)
            assert said.startswith(f"{line}: ")


@needs_kernels
def test_who_looks_on_sees_the_modules(monkeypatch) -> None:
    given = arguments()
    with ecanet.backend("reference"):
        assert explain(**given).endswith("backend('reference') or ECANET_BACKEND asks for it")
    with forward_ad.dual_level():
        assert explain(**given).endswith("forward-mode derivatives are taken")
    said = []
    torch.func.vmap(lambda x: said.append(explain(x, given["norm"], given["gate"])) or x)(given["x"][None])
    assert said[0].endswith("a transform of torch.func is active")


@needs_kernels
@pytest.mark.parametrize("gate", [ECA(C), SE(C), nn.Identity(), hooked(ECA(C))], ids=["ECA", "SE", "other", "hooked"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(C), nn.GroupNorm(2, C)], ids=["BatchNorm", "GroupNorm"])
def test_a_tail_is_decided_once(norm, gate, monkeypatch) -> None:
    decided = []
    decide = backend.decide
    monkeypatch.setattr(plans, "decide", lambda x: decided.append(x) or decide(x))
    norm_gate_add_act(**arguments(norm=norm, gate=gate, act=nn.GELU()))
    assert len(decided) == 1


@needs_kernels
def test_a_norm_that_returns_another_type_is_followed_by_the_modules() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.double()

    given = arguments(norm=Doubling())
    out = norm_gate_add_act(**given)
    assert out.dtype is torch.float64
    want = torch.relu(given["gate"](given["x"].double()) + given["residual"])
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        plans.plan(**arguments()).executor = "modules"


@pytest.mark.parametrize(
    ("changed", "error"),
    [({"act": "gelu"}, "act must be one of"), ({"x": torch.ones(2, C, 3, 4, dtype=torch.int)}, "x must be floating")],
    ids=["act", "x"],
)
def test_explain_refuses_what_the_tail_refuses(changed, error) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        explain(**arguments(**changed))


def test_the_table_in_the_docs_has_every_situation() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", DOCS.read_text(), re.MULTILINE)
    of_half_precision = "compiled: half precision on a GPU"
    assert "The type does not matter: half precision takes the same rows" in DOCS.read_text()
    assert set(rows) >= {*EAGER, *COMPILED, *ON_CPU_AND_GPU, *LOOKING_ON} - {of_half_precision}


@pytest.mark.parametrize("gate", [ECA(C), SE(C)], ids=["ECA", "SE"])
def test_an_empty_batch_leaves_the_statistics_as_they_are_also_compiled(gate) -> None:
    torch._dynamo.reset()
    norm = nn.BatchNorm2d(C)
    compiled = torch.compile(lambda x: norm_gate_add_act(x, norm, gate, None, "relu"), backend="aot_eager")
    compiled(torch.randn(0, C, 4, 4, requires_grad=True)).sum().backward()
    assert torch.equal(norm.running_mean, torch.zeros(C))
    assert torch.equal(norm.weight.grad, torch.zeros(C))
    torch._dynamo.reset()


def test_a_residual_that_is_not_dense_is_added_as_the_modules_add_it() -> None:
    given = arguments(norm=nn.BatchNorm2d(C).eval())
    want = norm_gate_add_act(**given)
    got = norm_gate_add_act(**{**given, "residual": given["residual"].to_sparse()})
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_synchronised_norm_that_a_hook_makes_is_a_plain_one(copied) -> None:
    norm = nn.SyncBatchNorm(C).eval()
    vars(norm)["forward"] = _SharedForward(norm)  # as while a hook runs, on a CPU
    other = copied(norm)
    del vars(norm)["forward"]
    x = torch.randn(2, C, 3, 4)
    assert torch.equal(other(x), norm(x))
    assert "forward" not in vars(other)
    assert torch.equal(norm_gate_add_act(x, copied(other)), norm_gate_add_act(x, norm))
