"""Surgery happens as a whole or not at all, and its report runs nothing of the user's."""

import copy
import functools
import io
import pickle
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import ecanet
from ecanet import fuse_tails_, insert_gates_, remove_gates_, replace_gates_
from ecanet.nn import ECA, SE, Gate, SEVar1, SEVar2, folding
from ecanet.surgery import fuse, insert, remove, replace
from tests.kernels_here import needs_kernels

C = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x))


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), Block(), Block(), Block())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    model[2].conv.register_forward_hook(lambda module, args, out: None)
    return model


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters())}])
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    return optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Modules, classes, hooks, values, groups and state, by identity and by bits."""
    return (
        [(n, id(m), type(m), sorted(vars(m)), list(m._modules), [id(p) for p in m._parameters.values()])
         for n, m in model.named_modules()],
        [[list(d.items()) for d in vars(m).values() if isinstance(d, dict) and "Parameter" not in repr(d)[:60]]
         for m in model.modules() if not list(m.children()) and not m._parameters],
        [[list(getattr(m, name).values()) for name in vars(m) if name.endswith("_hooks")] for m in model.modules()],
        {key: value.clone() for key, value in model.state_dict().items()},
        [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        {
            id(p): {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            for p, state in optimizer.state.items()
        },
    )  # fmt: skip


def assert_same(got: Any, want: Any) -> None:
    if isinstance(want, Tensor):
        assert torch.equal(got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)
    else:
        assert got == want


class StopError(Exception):
    pass


def third_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Raises at the third call, after it was done."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == 3:
            raise StopError
        return result

    return call


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        raise StopError

    return call


OPERATIONS: dict[str, Any] = {
    "insert, while gates are attached": (insert, "attach_", third_call, insert_gates_, {}),
    "insert, while the optimizer follows": (insert, "add_parameters_", third_call, insert_gates_, {}),
    "insert, while factors are folded": (insert, "fold_", third_call, insert_gates_, {"fold": True}),
    "insert, at the end": (insert, "keep_loading_", once, insert_gates_, {}),
    "remove, while gates are taken down": (remove, "detach_", third_call, remove_gates_, {"force": True}),
    "remove, while norms take values": (remove, "remove_parameters_", third_call, remove_gates_,
                                        {"force": True, "fold": True}),
    "remove, at the end": (remove, "keep_loading_", once, remove_gates_, {}),
    "replace, while gates are swapped": (replace, "_install_", third_call, replace_gates_, {"gate": "se"}),
    "replace, while the optimizer forgets": (replace, "remove_parameters_", third_call, replace_gates_, {"gate": "se"}),
    "replace, while the optimizer follows": (replace, "add_parameters_", third_call, replace_gates_, {"gate": "se"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_half_way_leaves_all_as_it_was(name, monkeypatch) -> None:
    module, function, breaking, operation, arguments = OPERATIONS[name]
    model = network()
    optimizer = trained(model)
    if operation is not insert_gates_:
        insert_gates_(model, optimizer=optimizer)
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        if "values" in name:
            ecanet.fold_factors_(model)
        if name == "remove, at the end":
            for gate in (m for m in model.modules() if isinstance(m, Gate)):
                gate.make_identity_()
    before = everything(model, optimizer)
    monkeypatch.setattr(module, function, breaking(getattr(module, function)))
    with pytest.raises(StopError):
        operation(model, optimizer=optimizer, **arguments)
    assert_same(everything(model, optimizer), before)
    monkeypatch.undo()
    assert operation(model, optimizer=optimizer, **arguments).rows  # and it can be done after all


def test_fusing_is_undone_too(monkeypatch) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("ecaresnet26t", num_classes=2)
    blocks = {name: type(m) for name, m in model.named_modules()}
    monkeypatch.setattr(fuse, "as_gate", third_call(fuse.as_gate))
    with pytest.raises(StopError):
        fuse_tails_(model)
    assert {name: type(m) for name, m in model.named_modules()} == blocks


# Gates that somebody hands in


def own_gate(channels: int = C, gate: type[Gate] = ECA) -> Gate:
    """A trained gate of somebody's, of another type and mode than the network, with gradients and a hook."""
    module = gate(channels).double().eval()
    module.factor = 1.5
    for parameter in module.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    module.register_forward_hook(lambda m, a, y: None)
    return module


def state_of(gate: nn.Module) -> Any:
    """All of a module by identity and by bits."""
    parts = list(gate.modules())
    tensors = [t for part in parts for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
    plain = [
        {key: value for key, value in vars(part).items() if isinstance(value, (bool, int, float, str))}
        for part in parts
    ]
    dicts = [{key: list(v.items()) for key, v in vars(part).items() if key.endswith("_hooks")} for part in parts]
    return (
        [sorted(vars(part)) for part in parts],
        plain,
        dicts,
        [(id(t), t.data_ptr(), t.dtype, str(t.device), t.requires_grad) for t in tensors],
        [t.detach().clone() for t in tensors],
        [None if t.grad is None else (t.grad.dtype, t.grad.clone()) for t in tensors],
    )


class CannotMove(ECA):
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        raise StopError


def given(gates: list[nn.Module]) -> Callable[[int], nn.Module]:
    """A factory that hands out what somebody has, one after another."""
    waiting = iter(gates)

    def factory(channels: int) -> nn.Module:
        return next(waiting)

    return factory


def insert_the_third_cannot_be_neutral(model: nn.Module, gates: list[nn.Module], optimizer: Any) -> None:
    insert_gates_(model, given([*gates, SEVar1(C)]), optimizer=optimizer)


def insert_the_third_has_other_channels(model: nn.Module, gates: list[nn.Module], optimizer: Any) -> None:
    insert_gates_(model, given([*gates, ECA(2 * C)]), optimizer=optimizer)


def insert_there_is_no_third(model: nn.Module, gates: list[nn.Module], optimizer: Any) -> None:
    insert_gates_(model, given(gates), optimizer=optimizer)


def insert_one_gate_for_all_to_be_folded(model: nn.Module, gates: list[nn.Module], optimizer: Any) -> None:
    insert_gates_(model, lambda channels: gates[0], fold=True, optimizer=optimizer)


def insert_where_a_norm_cannot_take_the_factor(model: nn.Module, gates: list[nn.Module], optimizer: Any) -> None:
    model[3].bn.register_forward_hook(lambda m, a, y: None)
    insert_gates_(model, given([*gates, own_gate()]), fold=True, optimizer=optimizer)


def insert_where_the_place_is_taken(model: nn.Module, gates: list[nn.Module], optimizer: Any) -> None:
    model[3].bn.gate = None
    insert_gates_(model, given([*gates, own_gate()]), optimizer=optimizer)


def replace_the_third_cannot_move(model: nn.Module, gates: list[nn.Module], optimizer: Any) -> None:
    names = ["1.bn.gate", "2.bn.gate", "3.bn.gate"]
    replace_gates_(model, dict(zip(names, [*gates, CannotMove(C)], strict=True)), optimizer=optimizer)


def replace_the_third_cannot_be_neutral(model: nn.Module, gates: list[nn.Module], optimizer: Any) -> None:
    replace_gates_(model, given([*gates, SEVar1(C)]), optimizer=optimizer)


def replace_there_is_no_third(model: nn.Module, gates: list[nn.Module], optimizer: Any) -> None:
    replace_gates_(model, given(gates), optimizer=optimizer)


FAILURES = [
    insert_the_third_cannot_be_neutral,
    insert_the_third_has_other_channels,
    insert_there_is_no_third,
    insert_one_gate_for_all_to_be_folded,
    insert_where_a_norm_cannot_take_the_factor,
    insert_where_the_place_is_taken,
    replace_the_third_cannot_move,
    replace_the_third_cannot_be_neutral,
    replace_there_is_no_third,
]


@pytest.mark.parametrize("fail", FAILURES)
def test_gates_that_were_handed_in_are_what_they_were_after_an_error(fail) -> None:
    model = network()
    optimizer = trained(model)
    if fail.__name__.startswith("replace"):
        insert_gates_(model, optimizer=optimizer)
    gates = [own_gate(), own_gate(gate=SE)]
    before = [state_of(gate) for gate in gates]
    with pytest.raises((StopError, StopIteration, ValueError)):
        fail(model, gates, optimizer)
    assert_same([state_of(gate) for gate in gates], before)


@pytest.mark.parametrize("operation", ["insert", "replace by a factory", "replace by name"])
def test_gates_that_were_handed_in_are_what_they_were_after_an_interrupt(operation, monkeypatch) -> None:
    model = network()
    optimizer = trained(model)
    gates: list[nn.Module] = [own_gate(gate=gate) for gate in (SE, SEVar2, SE)]
    if operation != "insert":
        insert_gates_(model, optimizer=optimizer)
    before = [state_of(gate) for gate in gates], everything(model, optimizer)
    place = insert if operation == "insert" else replace
    monkeypatch.setattr(place, "add_parameters_", third_call(place.add_parameters_))
    by_name = dict(zip(["1.bn.gate", "2.bn.gate", "3.bn.gate"], gates, strict=True))
    operate = insert_gates_ if operation == "insert" else replace_gates_
    with pytest.raises(StopError):
        operate(model, by_name if operation == "replace by name" else given(gates), optimizer=optimizer)
    assert_same(([state_of(gate) for gate in gates], everything(model, optimizer)), before)


# Folding


@pytest.mark.parametrize("trained_gates", [False, True], ids=["neutral gates", "trained gates"])
@pytest.mark.parametrize("back", [False, True], ids=["folded", "taken back"])
def test_folding_happens_as_a_whole_or_not_at_all(back, trained_gates, monkeypatch) -> None:
    model = network()
    insert_gates_(model)
    if trained_gates:
        for gate in (m for m in model.modules() if isinstance(m, Gate)):
            for parameter in gate.parameters():
                nn.init.normal_(parameter)
    if back:
        ecanet.fold_factors_(model)
    factor = 2.0 if back else 1.0
    optimizer = trained(model)
    before = everything(model, optimizer), [state_of(m) for m in model.modules() if isinstance(m, Gate)]
    monkeypatch.setattr(folding, "fold_", third_call(folding.fold_))
    with pytest.raises(StopError):
        ecanet.fold_factors_(model, factor=factor)
    after = everything(model, optimizer), [state_of(m) for m in model.modules() if isinstance(m, Gate)]
    assert_same(after, before)
    monkeypatch.undo()
    assert len(ecanet.fold_factors_(model, factor=factor)) == 3


def test_folding_into_weights_that_cannot_be_written_changes_nothing() -> None:
    model, x = network().eval(), torch.randn(2, 3, 6, 6)
    insert_gates_(model)
    with torch.inference_mode():
        last = nn.Parameter(torch.randn(1, 1, 3), requires_grad=False)
    model[3].bn.gate.conv.weight = last
    with torch.inference_mode():
        want = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inference tensor"):
        ecanet.fold_factors_(model)
    assert_same(dict(model.state_dict()), before)
    with torch.inference_mode():
        assert torch.equal(model(x), want)


class CannotBeCopied(ECA):
    def __deepcopy__(self, memo: Any) -> "CannotBeCopied":
        raise TypeError("no copies")


class HoldsAFile(ECA):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.file = io.StringIO().__iter__()
        self.generator = (i for i in range(3))


class WantsData(ECA):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.detach().sum().item() < 1e9 else x


@pytest.mark.parametrize("gate", [CannotBeCopied, HoldsAFile, WantsData])
def test_a_gate_that_cannot_be_run_without_data_goes_in_without_its_multiply_adds(gate) -> None:
    model, x = network().eval(), torch.randn(2, 3, 6, 6)
    want = model(x)
    report = insert_gates_(model, gate)
    assert len(report.rows) == 3
    assert report.multiply_adds is None
    torch.testing.assert_close(model(x), want)


# What the report runs


@contextmanager
def on_all_modules(seen: list[str]) -> Iterator[None]:
    handles = [
        register_module_forward_hook(lambda module, args, out: seen.append("global")),
        register_module_forward_pre_hook(lambda module, args: seen.append("global")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooked(gate: type[nn.Module], seen: list[str]) -> Callable[[int], nn.Module]:
    def build(channels: int) -> nn.Module:
        module = gate(channels)
        for part in module.modules():
            part.register_forward_hook(lambda m, a, y: seen.append("gate"))
            part.register_forward_pre_hook(lambda m, a: seen.append("gate"))
        return module

    return build


@pytest.mark.parametrize("gate", [ECA, SE])
def test_the_report_runs_no_hook(gate) -> None:
    model, seen = network(), []
    for module in model.modules():
        module.register_forward_hook(lambda m, a, y: seen.append("network"))
        module.register_forward_pre_hook(lambda m, a: seen.append("network"))
        module.register_full_backward_hook(lambda m, i, o: None)
    with on_all_modules(seen):
        report = insert_gates_(model, hooked(gate, seen))
        assert report.multiply_adds is not None
        again = replace_gates_(model, hooked(SE if gate is ECA else ECA, seen))
        assert again.multiply_adds is not None
        remove_gates_(model, force=True)
    assert not seen
    with on_all_modules(seen):
        model(torch.randn(2, 3, 6, 6))
    assert "network" in seen
    assert "global" in seen


class Unpicklable:
    """A hook that no copy can be made of."""

    def __call__(self, *args: Any) -> None:
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickle.PicklingError("no copies")


def test_hooks_that_cannot_be_copied_are_no_obstacle() -> None:
    model = network()
    model[1].register_forward_hook(Unpicklable())
    model[3].conv.register_forward_pre_hook(Unpicklable())
    assert insert_gates_(model).multiply_adds is not None


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("gate", ["eca", "se", "se_var2"])
@needs_kernels
def test_multiply_adds_are_counted_whatever_the_backend(gate, backend) -> None:
    want = insert_gates_(network(), gate, preserve=False).multiply_adds
    with ecanet.backend(backend):
        report = insert_gates_(network(), gate, preserve=False)
        assert report.multiply_adds == want is not None
        assert replace_gates_(copy.deepcopy(network_with(gate)), "se_var1").multiply_adds is not None


def network_with(gate: str) -> nn.Module:
    model = network()
    model[2].conv._forward_hooks.clear()
    insert_gates_(model, gate, preserve=False)
    return model


# What the report's run without data runs instead of the network


class Counting(nn.Module):
    """Convolution and norm that count their calls, and keep what they saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU()
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        return self.act(self.bn(self.conv(x)))


def closed_over(block: Any) -> None:
    forward = block.forward
    block.forward = lambda x: forward(x) * 1


def closed_over_twice(block: Any) -> None:
    closed_over(block)
    closed_over(block)


def closed_over_its_layers(block: Any) -> None:
    conv, rest = block.conv, [block.bn, block.act]

    def forward(x: Tensor, last: nn.Module = rest[1]) -> Tensor:
        block.calls += 1
        return last(rest[0](conv(x)))

    block.forward = forward


def bound(block: Any) -> None:
    forward = block.forward
    block.forward = types.MethodType(lambda self, x: forward(x), block)


def partial(block: Any) -> None:
    forward = block.forward
    block.forward = functools.partial(lambda run, x: run(x), forward)


def in_a_dictionary(block: Any) -> None:
    block.ways = {"usual": [type(block).forward, lambda x: Counting.forward(block, x)]}
    block.forward = types.MethodType(lambda self, x: self.ways["usual"][1](x), block)


def in_a_list_that_holds_itself(block: Any) -> None:
    forward = block.forward
    block.ways = [lambda x: forward(x)]
    block.ways.append(block.ways)
    block.forward = types.MethodType(lambda self, x: self.ways[1][0](x), block)


def weakly(block: Any) -> None:
    block.me = weakref.ref(block)
    block.forward = types.MethodType(lambda self, x: Counting.forward(self.me(), x), block)


def of_a_leaf(block: Any) -> None:
    forward, calls = block.bn.forward, [0]

    def counted(x: Tensor) -> Tensor:
        calls[0] += 1
        return forward(x)

    block.bn.forward = counted
    block.bn.counter = calls


def offloaded(block: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.hooks.add_hook_to_module(block, accelerate.hooks.ModelHook())


def beside_a_lock(block: Any) -> None:
    forward, lock = block.forward, threading.Lock()

    def locked(x: Tensor) -> Tensor:
        with lock:
            return forward(x)

    block.forward = locked


WAYS = [closed_over, closed_over_twice, closed_over_its_layers, bound, partial, in_a_dictionary, weakly, of_a_leaf]
WAYS += [in_a_list_that_holds_itself]
WAYS += [offloaded, beside_a_lock]


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_was_put_on_a_module_runs_on_the_copy_alone(way) -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 1), Counting()).train()
    want = insert_gates_(copy.deepcopy(model), where="1.bn").multiply_adds
    way(model[1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen: list[str] = []
    for part in model.modules():
        part.register_forward_hook(lambda m, a, y: seen.append("run"))
    report = insert_gates_(model, where="1.bn")
    assert report.multiply_adds == want is not None
    assert not report.notes
    assert not seen
    assert (model[1].calls, model[1].seen, getattr(model[1].bn, "counter", [0])) == (0, [], [0])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model(torch.randn(2, 3, 4, 4))
    assert model[1].calls == 1


def test_code_that_calls_the_network_from_its_copy_is_stopped_and_the_report_knows_no_costs() -> None:
    """A class that was made around one network reaches it from every copy."""
    inner = Counting()

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, C, 1), inner

        def forward(self, x: Tensor) -> Tensor:
            try:
                return inner(self.stem(x))
            except Exception:
                return x

    model, seen = Around(), []
    inner.register_forward_hook(lambda m, a, y: seen.append("run"))
    report = insert_gates_(model, where="inner.bn")
    assert (inner.calls, inner.seen, seen) == (0, [], [])
    assert [row.multiply_adds for row in report.rows] == [None]
    assert report.multiply_adds is None
    assert any("cannot be run on a copy, which calls the network's inner itself" in note for note in report.notes)
    assert "multiply-adds per sample" not in str(report)


def test_a_module_that_is_its_own_copy_does_not_run() -> None:
    class Single(Counting):
        def __deepcopy__(self, memo: Any) -> "Single":
            return self

    model = nn.Sequential(nn.Conv2d(3, C, 1), Single())
    report = insert_gates_(model, where="1.bn")
    assert report.multiply_adds is None
    assert any("a Single is its own copy" in note for note in report.notes), report.notes
    assert (model[1].calls, len(model[1].conv._forward_hooks), len(model[1].bn._forward_hooks)) == (0, 0, 1)


def test_where_no_layer_is_called_the_multiply_adds_are_not_known() -> None:
    class Functional(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(nn.functional.conv2d(x, self.conv.weight))

    report = insert_gates_(Functional(), where="bn", input_shape=(1, C, 6, 6))
    assert report.multiply_adds is None
    assert any("no layer was seen to run" in note for note in report.notes), report.notes


def test_a_gate_on_a_layer_that_is_not_used_costs_nothing() -> None:
    class Unused(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x))

    report = insert_gates_(Unused(), where="bn", input_shape=(1, C, 6, 6))
    assert report.multiply_adds == 0
    assert any("bn did not run on the input" in note for note in report.notes), report.notes


def test_swapping_runs_the_copy_alone_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 1), Counting())
    insert_gates_(model, where="1.bn")
    closed_over_its_layers(model[1])
    report = replace_gates_(model, "se")
    assert report.multiply_adds is not None
    assert (model[1].calls, model[1].seen) == (0, [])
