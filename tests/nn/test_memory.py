"""No step keeps memory: after 20 steps there are as many tensors and bytes as before, whatever the steps do."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from equations import GATES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ecanet
from ecanet.nn import SRM, norm_gate_add_act
from ecanet.nn.attached import attach_

C = 64
#: A gate of every class, a circular one, and ECA with a hard sigmoid, which has no closed form: the groups of se_gc1 to
#: se_gc3 differ in their size alone, gates of another activation in one function of their logits.
OF_ANOTHER_ACTIVATION = ("eca_ns hard", "se hard", "se_var1 hard", "ese soft")
NAMES = [name for name in GATES if name not in ("eca_ns circular", "se_gc1", "se_gc3", *OF_ANOTHER_ACTIVATION)]
STEPS = 20
MAP = (4, C, 28, 28)  # 0.8 MiB: one that is kept a step comes to 16 MiB
MOST_MIB = 12


def tensors() -> int:
    gc.collect()
    return sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects())


def resident_mib() -> float:
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # what is free goes back to the system, and is not counted
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


class Step:
    """A norm, a gate, and what is done with them."""

    def __init__(self, name: str) -> None:
        self.norm, self.gate = nn.BatchNorm2d(C), GATES[name](C)
        self.x = torch.randn(MAP, requires_grad=True)

    def tail(self) -> Tensor:
        return norm_gate_add_act(self.x, self.norm, self.gate, self.x, "relu")


def tail(step: Step) -> None:
    step.tail().sum().backward()


def module(step: Step) -> None:
    step.gate(step.x).sum().backward()


def checkpointed(step: Step) -> None:
    for reentrant in (False, True):
        checkpoint(
            norm_gate_add_act, step.x, step.norm, step.gate, step.x, "relu", use_reentrant=reentrant
        ).sum().backward()


def hook_on_the_norm(step: Step) -> None:
    handle = step.norm.register_forward_hook(lambda module, args, output: output + 1)
    step.tail().sum().backward()
    handle.remove()


def forward_alone(step: Step) -> None:
    step.tail()
    step.gate(step.x)
    with torch.no_grad():
        step.tail()


def backward_that_raises(step: Step) -> None:
    def stop(grad: Tensor) -> None:
        raise ZeroDivisionError

    before = step.x * 1
    before.register_hook(stop)
    out = norm_gate_add_act(before, step.norm, step.gate, step.x, "relu")
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()


def gradient_penalty(step: Step) -> None:
    if isinstance(step.gate, SRM):  # its norm keeps more than weights: an error
        return
    (grad,) = torch.autograd.grad(step.tail().square().sum(), step.x, create_graph=True)
    grad.square().sum().backward()


def twice_in_one_forward(step: Step) -> None:
    out = norm_gate_add_act(step.tail(), step.norm, step.gate, step.x, "silu")
    (out + step.gate(out)).sum().backward()


def backward_twice(step: Step) -> None:
    out = step.tail().sum()
    out.backward(retain_graph=True)
    out.backward()


def frozen(step: Step) -> None:
    step.norm.eval().requires_grad_(False)
    step.tail().sum().backward()
    step.gate.requires_grad_(False)
    step.tail().sum().backward()
    step.gate.requires_grad_(True)


def with_a_factor_and_hooks_on_saved_tensors(step: Step) -> None:
    step.gate.factor = 2.0
    with torch.autograd.graph.save_on_cpu():
        step.tail().sum().backward()
    step.gate.factor = 1.0


def attached(step: Step) -> None:
    if "gate" not in step.norm._modules:
        attach_(step.norm, step.gate)
    norm_gate_add_act(step.x, step.norm, None, step.x, "relu").sum().backward()
    step.norm(step.x).sum().backward()


def gradients_alone(step: Step) -> None:
    torch.autograd.grad(step.tail().sum(), [step.x, *step.gate.parameters()])


STEPS_OF_ALL_KINDS = [
    tail, module, checkpointed, hook_on_the_norm, forward_alone, backward_that_raises, gradient_penalty,
    twice_in_one_forward, backward_twice, frozen, with_a_factor_and_hooks_on_saved_tensors, attached, gradients_alone,
]  # fmt: skip


def assert_nothing_is_kept(run: Callable[[], object], what: str) -> None:
    for _ in range(5):
        run()
    before, memory = tensors(), resident_mib()
    for _ in range(STEPS):
        run()
    after = tensors()
    assert after <= before + 2, f"{what}: {(after - before) / STEPS:.1f} tensors a step"
    assert resident_mib() < memory + MOST_MIB, f"{what}: {(resident_mib() - memory) / STEPS:.2f} MiB a step"


def assert_no_gate_keeps_anything(do: Callable[[Step], None]) -> None:
    steps = {name: Step(name) for name in NAMES}
    try:
        assert_nothing_is_kept(lambda: [do(step) for step in steps.values()], "all gates")
    except AssertionError:  # which of them?
        for name, step in steps.items():
            assert_nothing_is_kept(lambda step=step: do(step), name)
        raise


@pytest.mark.parametrize("do", STEPS_OF_ALL_KINDS, ids=lambda do: do.__name__)
def test_no_step_keeps_anything(do) -> None:
    assert_no_gate_keeps_anything(do)


def test_no_step_in_plain_pytorch_keeps_anything() -> None:
    with ecanet.backend("reference"):
        assert_no_gate_keeps_anything(tail)


@pytest.mark.parametrize("name", NAMES)
def test_no_compiled_step_keeps_anything(name) -> None:
    torch._dynamo.reset()
    step = Step(name)
    compiled = torch.compile(norm_gate_add_act, backend="aot_eager")
    assert_nothing_is_kept(lambda: compiled(step.x, step.norm, step.gate, step.x, "relu").sum().backward(), name)


@pytest.mark.parametrize("name", ["ecanet", "timm"])
def test_no_network_keeps_anything(name) -> None:
    if name == "ecanet":
        net = ecanet.models.small_eca_resnet(gate="se")
    else:
        net = timm.create_model("seresnet18", num_classes=5, channels=(32, 32, 64, 64))
        ecanet.fuse_tails_(net)
    x = torch.randn(4, 3, 32, 32)
    assert_nothing_is_kept(lambda: net(x).sum().backward(), name)


def test_a_kept_graph_would_be_seen() -> None:
    kept: list[Tensor] = []
    with pytest.raises(AssertionError, match="tensors a step"):
        assert_nothing_is_kept(lambda: kept.append(torch.ones(3) * 2), "a list")
    big: list[bytes] = []
    with pytest.raises(AssertionError, match="MiB a step"):
        assert_nothing_is_kept(lambda: big.append(bytes([len(big)]) * 2**20), "a megabyte")
