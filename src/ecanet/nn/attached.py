"""A gate attached to a module: it scales what the module returns, and the module stays what and where it was.

The gate is the module's child ``gate``, and a forward hook calls it, so every key of the network stays and the gate's
are ``NAME.gate.*``. The hook is a function of this file and finds the gate through its module: copies and pickles of
the network work.

Tools that take networks apart do not know of gates. So that none is lost in silence:

- Another module takes the place of one with a gate, as timm's ``freeze_batch_norm_2d`` does it: the gate is attached to
  the new one. There is a warning instead if the new one is part of something else already.
- An adapter is wrapped around a module with a gate: the adapter gets the gate, and gives it back when it is taken off.
- A BatchNorm is built anew and gets the children of the old one, as by
  :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`: the gate among them attaches itself.
- Torch's functions that merge a norm into the layer before it raise.
- :mod:`torch.fx` traces the ``forward`` of a module and passes its hooks by: the graph calls the gate at its end.
"""

import functools
import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.nn.utils.fusion
from torch import fx, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ecanet.nn.absent_gates import ATTACHED, fill_with_gates_
from ecanet.private_torch import NormBase

#: Name of the gate in the module it is attached to.
GATE = "gate"

#: These call their children, or let others: one more would run, too.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _run_gate(host: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook: what the module returns, scaled."""
    gate = host._modules.get(GATE)
    if gate is None:
        raise RuntimeError(
            f"a {type(host).__name__} took over the hook of a module with a gate, and not the gate: whatever "
            "rebuilt the module would have dropped it; remove_gates_ before, and insert_gates_ afterwards"
        )
    return gate(output)


_run_gate.__name__ = _run_gate.__qualname__ = "run_gate"  # what pickles name


def __getattr__(name: str) -> Any:
    """Give out the hook under the name that pickles have: a gate is attached in this process from then on."""
    if name != "run_gate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _watch_tools()
    return _run_gate


def is_hook_of_a_gate(hook: object) -> bool:
    """Whether a forward hook is the one that runs the gate of a host."""
    return hook is _run_gate


def attach_(host: nn.Module, gate: nn.Module) -> None:
    """Hang a gate on a module that has none.

    Raises:
        ValueError: the module has something called ``gate`` already, calls all of its children, or is one of torch.fx.
    """
    if isinstance(host, CONTAINERS):
        raise ValueError(
            f"a gate cannot be attached to a {type(host).__name__}, which runs its children: name its last one"
        )
    if isinstance(host, fx.GraphModule):
        raise ValueError(
            f"a gate cannot be attached to a GraphModule ({type(host).__name__}), whose graph torch.fx copies and runs "
            "without hooks: name the last module in it, or attach the gate before the trace, which takes it along"
        )
    if hasattr(host, GATE):
        raise ValueError(f"a {type(host).__name__} with an attribute {GATE!r} of its own cannot take one: wrap it")
    _watch_tools()
    host.register_module(GATE, gate)
    if _run_gate not in host._forward_hooks.values():  # it may be there, from the module's former gate
        host.register_forward_hook(_run_gate)
    setattr(gate, ATTACHED, True)


def _hand_on_the_gate(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """What takes the place of a host gets its gate; where that could be wrong, one is told."""
    if new is None or not isinstance(children := parent.__dict__.get("_modules"), dict):  # TorchScript has another
        return
    if type(parent).__module__.startswith("torch.ao.nn.") and attached_gate(new) is not None:
        raise _would_be_lost(type(new).__name__, f"torch.ao's {type(parent).__name__}")
    old = children.get(name)
    if old is None or old is new or (gate := attached_gate(old)) is None:
        return
    problem = _wrap(parent, old, new, gate) if old in new.modules() else _replace(parent, old, new, gate)
    if problem is not None:
        place = f"a {type(new).__name__} takes the place {name!r} of a {type(old).__name__} that a gate is attached to"
        warnings.warn(f"{place}, and {problem}", stacklevel=3)


def _replace(parent: nn.Module, old: nn.Module, new: nn.Module, gate: nn.Module) -> str | None:
    """Hang the gate on what takes its host's place; what lives elsewhere, too, would be scaled there: says so."""
    if any(module is gate or getattr(module, ATTACHED, False) for module in new.modules()):
        return None  # it brings one
    if any(module is new for module in parent.children()):
        return None  # modules of one parent change places
    if _is_registered(new, but_in=old.modules()):
        return "the gate goes with the old one: insert_gates_ attaches another to the new one"
    if new in old.modules():  # an adapter is taken off
        detach_(old)
    attach_(new, gate)
    fill_with_gates_(new)
    return None


def _wrap(parent: nn.Module, old: nn.Module, new: nn.Module, gate: nn.Module) -> str | None:
    """What takes a host's place and holds it: the gate stays inside, but for adapters, such as peft's.

    These add to what the host returns, or compute it anew, and can merge that into the host's weights: they return what
    the host will, so they get the gate. For what only passes on, it does not matter. Others nobody knows: says so.
    """
    if not any(child is old for child in new.children()) or not callable(getattr(new, "merge", None)):
        own = {*new.parameters()} - {*old.parameters()}
        others = any(attached_gate(module) is not None for module in new.modules() if module is not old)
        if not own or others or type(new).__module__.startswith("torch."):
            return None
        return (
            "holds it: the gate scales what the old one returns, and not what the new one adds. If it is to scale all "
            "of it: remove_gates_ before, and insert_gates_ afterwards, with where= that place"
        )
    if [*parent._modules.values()].count(old) > 1 or _is_registered(old, but_in=(parent, *new.modules())):
        return (
            "adapts it, which is part of something else, too: the gate does not scale what the new one adds. Adapt it "
            "without a gate, and insert_gates_ afterwards"
        )
    detach_(old)
    attach_(new, gate)
    fill_with_gates_(new)
    return None


def _is_registered(module: nn.Module, but_in: Iterable[nn.Module] = ()) -> bool:
    """Whether a module is some module's child, other than those named. Slow: looks at all that refers to it."""
    named = [id(vars(owner)["_modules"]) for owner in but_in]
    return any(
        isinstance(held, dict) and id(held) not in named and _are_children(held) for held in gc.get_referrers(module)
    )


def _are_children(held: dict[Any, Any]) -> bool:
    """Whether a dictionary is what a module keeps its children in."""
    return any(
        (isinstance(owner, dict) and owner.get("_modules") is held)
        or (isinstance(owner, nn.Module) and vars(owner).get("_modules") is held)
        for owner in gc.get_referrers(held)
    )


def _would_be_lost(host: str, tool: str) -> ValueError:
    return ValueError(
        f"a gate is attached to the {host} that {tool} merges with the layer before it, and would be lost: "
        "optimize_for_inference merges them and keeps the gate, remove_gates_ takes it out"
    )


def refuses_gates(merge: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A function that makes one layer of a layer and a norm, so that it raises where a gate is attached to either."""

    @functools.wraps(merge)
    def merge_without_gates(*args: Any, **kwargs: Any) -> nn.Module:
        for module in (*args, *kwargs.values()):
            if isinstance(module, nn.Module) and attached_gate(module) is not None:
                raise _would_be_lost(type(module).__name__, merge.__name__)
        return merge(*args, **kwargs)

    return merge_without_gates


def calls_the_gate(trace: Callable[..., fx.Graph]) -> Callable[..., fx.Graph]:
    """:meth:`torch.fx.Tracer.trace`, so that the graph of a module that a gate is attached to ends with the gate.

    A graph is what all that follows copies, splits, interprets and rewrites; the hook is on the module it was made of.
    """

    @functools.wraps(trace)
    def trace_with_gate(tracer: fx.Tracer, root: Any, *args: Any, **kwargs: Any) -> fx.Graph:
        graph = trace(tracer, root, *args, **kwargs)
        gate = attached_gate(root) if isinstance(root, nn.Module) and tracer.traced_func_name == "forward" else None
        if gate is None:
            return graph

        def as_it_is(*args: Any, **kwargs: Any) -> fx.Proxy:  # not looked into, as the trace is over
            return tracer.create_proxy("call_module", GATE, args, kwargs)

        end = graph.output_node()
        with graph.inserting_before(end):
            end.args = fx.map_arg(
                end.args, lambda node: tracer.call_module(gate, as_it_is, (tracer.proxy(node),), {}).node
            )
        return graph

    return trace_with_gate


def _attach_to_the_new_host(host: nn.Module, name: str, gate: nn.Module | None) -> None:
    is_attached = name == GATE and getattr(gate, ATTACHED, False) and isinstance(host, NormBase)
    if is_attached and _run_gate not in host._forward_hooks.values():
        host.register_forward_hook(_run_gate)
        fill_with_gates_(host)


#: Who has torch's functions that merge layers under their own names, if they were imported already.
_BORROWERS = ("torch.nn.utils.fusion", "torch.nn.utils", "torch.fx.experimental.optimization")


@functools.cache
def _watch_tools() -> None:
    """Change what tools of torch do to modules with a gate, in this process, for good: before the first is attached."""
    register_module_module_registration_hook(_hand_on_the_gate)
    register_module_module_registration_hook(_attach_to_the_new_host)
    setattr(fx.Tracer, "trace", calls_the_gate(fx.Tracer.trace))  # noqa: B010
    for name in ("fuse_conv_bn_eval", "fuse_linear_bn_eval"):
        merge: Callable[..., nn.Module] = getattr(torch.nn.utils.fusion, name)
        for borrower in _BORROWERS:
            if getattr(sys.modules.get(borrower), name, None) == merge:
                setattr(sys.modules[borrower], name, refuses_gates(merge))


def attached_gate(host: nn.Module) -> nn.Module | None:
    """The gate that is attached to a module, or None."""
    children = host._modules
    gate = children.get(GATE) if isinstance(children, dict) else None  # TorchScript has something else
    return gate if gate is not None and _run_gate in host._forward_hooks.values() else None


def attached_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name and module of every host of a gate, and the gate."""
    for name, host in model.named_modules():
        gate = attached_gate(host)
        if gate is not None:
            yield name, host, gate


def detach_(host: nn.Module) -> None:
    """Remove the gate that is attached to a module, and its hook."""
    for key in [key for key, hook in host._forward_hooks.items() if hook is _run_gate]:
        del host._forward_hooks[key]
    vars(host._modules.pop(GATE)).pop(ATTACHED, None)
