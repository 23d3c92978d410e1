"""A gate attached to a module (its host): it scales what the module returns, and the module itself does not change.

The gate is the module's child ``gate``, and a forward hook calls it. So all keys of the network stay the same, and the
gate's keys are ``NAME.gate.*``. The hook is a function of this file that finds the gate through its module, so copies
and pickles of the network work.

Tools that rebuild or rewrite networks do not know about gates. This file keeps them from losing gates silently:

- A module replaces one with a gate, as in timm's ``freeze_batch_norm_2d``: the gate is attached to the new module. If
  the new module is already part of something else, there is a warning instead.
- An adapter wraps a module with a gate: the adapter gets the gate, and gives it back when it is removed.
- A BatchNorm is rebuilt with the children of the old one, as in
  :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`: the gate among them is attached to the new one.
- Torch's functions that merge a norm into the layer before it raise an error.
- :mod:`torch.fx` traces a module's ``forward`` and ignores its hooks: the graph is made to call the gate at its end.
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

#: Name of the gate as a child of its host.
GATE = "gate"

#: They, or the code that iterates over them, run every child: a gate added as a child would run too.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _run_gate(host: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook: scales what the host returns."""
    gate = host._modules.get(GATE)
    if gate is None:
        raise RuntimeError(
            f"a {type(host).__name__} has the hook of a module with a gate, but not the gate: the code that rebuilt "
            "the module dropped it. Call remove_gates_ before that code, and insert_gates_ afterwards"
        )
    return gate(output)


_run_gate.__name__ = _run_gate.__qualname__ = "run_gate"  # the name in pickles


def __getattr__(name: str) -> Any:
    """Return the hook by its name in pickles, and patch the tools: the network that is unpickled has a gate."""
    if name != "run_gate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _patch_tools()
    return _run_gate


def is_hook_of_a_gate(hook: object) -> bool:
    """Whether a forward hook is the one that runs an attached gate."""
    return hook is _run_gate


def attach_(host: nn.Module, gate: nn.Module) -> None:
    """Attach a gate to a module that has none.

    Raises:
        ValueError: the module already has an attribute ``gate``, runs all of its children, or is a torch.fx module.
    """
    if isinstance(host, CONTAINERS):
        raise ValueError(
            f"a gate cannot be attached to a {type(host).__name__}, which runs its children: name its last one"
        )
    if isinstance(host, fx.GraphModule):
        raise ValueError(
            f"a gate cannot be attached to a GraphModule ({type(host).__name__}), whose graph torch.fx copies and runs "
            "without hooks: name the last module in it, or attach the gate before the trace, which then includes it"
        )
    if hasattr(host, GATE):
        raise ValueError(f"a {type(host).__name__} with its own attribute {GATE!r} cannot take a gate: wrap it")
    _patch_tools()
    host.register_module(GATE, gate)
    if _run_gate not in host._forward_hooks.values():  # it may be left from an earlier gate
        host.register_forward_hook(_run_gate)
    setattr(gate, ATTACHED, True)


def _keep_the_gate(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """The registration hook: what takes the place of a host gets its gate, or a warning says why not."""
    if new is None or not isinstance(children := parent.__dict__.get("_modules"), dict):  # no dict in TorchScript
        return
    if type(parent).__module__.startswith("torch.ao.nn.") and attached_gate(new) is not None:
        raise _would_be_lost(type(new).__name__, f"torch.ao's {type(parent).__name__}")
    old = children.get(name)
    if old is None or old is new or (gate := attached_gate(old)) is None:
        return
    keep = _keep_when_wrapped if old in new.modules() else _keep_when_replaced
    problem = keep(parent, old, new, gate)
    if problem is not None:
        place = f"a {type(new).__name__} takes the place {name!r} of a {type(old).__name__} that a gate is attached to"
        warnings.warn(f"{place}, and {problem}", stacklevel=3)


def _keep_when_replaced(parent: nn.Module, old: nn.Module, new: nn.Module, gate: nn.Module) -> str | None:
    """Attach the gate to its host's replacement, or say why not: if used elsewhere, it would be scaled there too."""
    if any(module is gate or getattr(module, ATTACHED, False) for module in new.modules()):
        return None  # it has a gate
    if any(module is new for module in parent.children()):
        return None  # children of one parent swap places
    if _is_registered(new, ignoring=old.modules()):
        return "the gate goes with the old one: insert_gates_ attaches another to the new one"
    if new in old.modules():  # an adapter is removed
        detach_(old)
    attach_(new, gate)
    fill_with_gates_(new)
    return None


def _keep_when_wrapped(parent: nn.Module, old: nn.Module, new: nn.Module, gate: nn.Module) -> str | None:
    """Keep the gate inside a wrapper that takes its host's place, or move it to an adapter, such as peft's.

    An adapter adds to what the host returns, or recomputes it, and can merge the result into the host's weights. It
    returns what the merged host would, so it gets the gate. For a wrapper without parameters it makes no difference.
    For other wrappers the right place is unknown: the result says so.
    """
    if not any(child is old for child in new.children()) or not callable(getattr(new, "merge", None)):
        own = {*new.parameters()} - {*old.parameters()}
        has_other_gate = any(attached_gate(module) is not None for module in new.modules() if module is not old)
        if not own or has_other_gate or type(new).__module__.startswith("torch."):
            return None
        return (
            "holds it: the gate scales what the old one returns, but not what the new one adds. To scale both, call "
            "remove_gates_ before, and insert_gates_ afterwards with where= that place"
        )
    if [*parent._modules.values()].count(old) > 1 or _is_registered(old, ignoring=(parent, *new.modules())):
        return (
            "adapts it, but the old one is also part of something else: the gate does not scale what the new one adds. "
            "Adapt it without a gate, and insert_gates_ afterwards"
        )
    detach_(old)
    attach_(new, gate)
    fill_with_gates_(new)
    return None


def _is_registered(module: nn.Module, ignoring: Iterable[nn.Module] = ()) -> bool:
    """Whether a module is a child of any module not in ``ignoring``. Slow: it inspects all references to the module."""
    excluded = [id(vars(owner)["_modules"]) for owner in ignoring]
    return any(
        isinstance(held, dict) and id(held) not in excluded and _holds_children(held)
        for held in gc.get_referrers(module)
    )


def _holds_children(held: dict[Any, Any]) -> bool:
    """Whether a dictionary is the ``_modules`` of some module."""
    return any(
        (isinstance(owner, dict) and owner.get("_modules") is held)
        or (isinstance(owner, nn.Module) and vars(owner).get("_modules") is held)
        for owner in gc.get_referrers(held)
    )


def _would_be_lost(host: str, tool: str) -> ValueError:
    return ValueError(
        f"a gate is attached to the {host} that {tool} merges with the layer before it, and would be lost: "
        "optimize_for_inference merges them and keeps the gate; remove_gates_ removes it"
    )


def refuses_gates(merge: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap a function that merges a layer and a norm: it raises if a gate is attached to either."""

    @functools.wraps(merge)
    def merge_without_gates(*args: Any, **kwargs: Any) -> nn.Module:
        for module in (*args, *kwargs.values()):
            if isinstance(module, nn.Module) and attached_gate(module) is not None:
                raise _would_be_lost(type(module).__name__, merge.__name__)
        return merge(*args, **kwargs)

    return merge_without_gates


def calls_the_gate(trace: Callable[..., fx.Graph]) -> Callable[..., fx.Graph]:
    """Wrap :meth:`torch.fx.Tracer.trace`: if a gate is attached to the traced module, the graph ends with the gate.

    Everything after the trace works on the graph alone, and the hook is not in it but on the traced module.
    """

    @functools.wraps(trace)
    def trace_with_gate(tracer: fx.Tracer, root: Any, *args: Any, **kwargs: Any) -> fx.Graph:
        graph = trace(tracer, root, *args, **kwargs)
        gate = attached_gate(root) if isinstance(root, nn.Module) and tracer.traced_func_name == "forward" else None
        if gate is None:
            return graph

        def create_call(*args: Any, **kwargs: Any) -> fx.Proxy:  # a single call: the trace is over
            return tracer.create_proxy("call_module", GATE, args, kwargs)

        end = graph.output_node()
        with graph.inserting_before(end):
            end.args = fx.map_arg(
                end.args, lambda node: tracer.call_module(gate, create_call, (tracer.proxy(node),), {}).node
            )
        return graph

    return trace_with_gate


def _attach_to_rebuilt_norm(host: nn.Module, name: str, gate: nn.Module | None) -> None:
    is_attached = name == GATE and getattr(gate, ATTACHED, False) and isinstance(host, NormBase)
    if is_attached and _run_gate not in host._forward_hooks.values():
        host.register_forward_hook(_run_gate)
        fill_with_gates_(host)


#: Modules that hold references to torch's functions that merge layers, if they are imported.
_IMPORTERS = ("torch.nn.utils.fusion", "torch.nn.utils", "torch.fx.experimental.optimization")


@functools.cache
def _patch_tools() -> None:
    """Patch torch's tools, for the rest of the process, to respect gates; called before the first one is attached."""
    register_module_module_registration_hook(_keep_the_gate)
    register_module_module_registration_hook(_attach_to_rebuilt_norm)
    setattr(fx.Tracer, "trace", calls_the_gate(fx.Tracer.trace))  # noqa: B010
    for name in ("fuse_conv_bn_eval", "fuse_linear_bn_eval"):
        merge: Callable[..., nn.Module] = getattr(torch.nn.utils.fusion, name)
        for importer in _IMPORTERS:
            if getattr(sys.modules.get(importer), name, None) == merge:
                setattr(sys.modules[importer], name, refuses_gates(merge))


def attached_gate(host: nn.Module) -> nn.Module | None:
    """The gate that is attached to a module, or None."""
    children = host._modules
    gate = children.get(GATE) if isinstance(children, dict) else None  # no dict in TorchScript
    return gate if gate is not None and _run_gate in host._forward_hooks.values() else None


def attached_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """The name of every host, the host, and its gate."""
    for name, host in model.named_modules():
        gate = attached_gate(host)
        if gate is not None:
            yield name, host, gate


def detach_(host: nn.Module) -> None:
    """Remove the gate that is attached to a module, and its hook."""
    for key in [key for key, hook in host._forward_hooks.items() if hook is _run_gate]:
        del host._forward_hooks[key]
    vars(host._modules.pop(GATE)).pop(ATTACHED, None)
