"""What the code of one module shows: its graph, attention in it, and activations of any class."""

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ecanet.inspect.observe import example_tensor, twin_of, without_hooks_on_all_modules
from ecanet.surgery.layers import CONVOLUTIONS, is_activation, is_attention, is_transparent

MULTIPLICATIONS: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_SQUASHING = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Softsign, nn.LogSigmoid, nn.Softmax, nn.Softmax2d)
_SQUASHING_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(torch.sigmoid, torch.tanh, torch.softmax, F.sigmoid, F.tanh, F.hardsigmoid, F.softmax),
        *("sigmoid", "sigmoid_", "tanh", "tanh_", "softmax"),
    }
)
_POOLS = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_POOLING_FUNCTIONS: frozenset[Any] = frozenset(
    {torch.mean, torch.amax, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool1d, "mean", "amax"}
)


class ChildrenAsTheyAre(fx.Tracer):
    """Traces the code of one module; its children are not looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Always."""
        return True


def trace(module: nn.Module) -> fx.Graph | str:
    """The graph of one module's own code, or why there is none.

    Arguments have their defaults where these are flags, numbers or None, so that code that asks for them is followed as
    it usually runs.
    """
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
        usual = {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, (bool, int, str))}
        if usual:
            return ChildrenAsTheyAre().trace(_stand_in(module), concrete_args=usual)
    except Exception:  # it needs one of them
        pass
    try:
        return ChildrenAsTheyAre().trace(_stand_in(module))
    except Exception as error:  # whatever the module's code does with a proxy
        return f"{type(error).__name__}: {error}".splitlines()[0]


def cannot_trace(why: str) -> str:
    """What :func:`trace` returned in place of a graph, for a report."""
    return f"torch.fx cannot trace its code ({why})"


def _stand_in(module: nn.Module) -> nn.Module:
    """A module of the same class, children and attributes, in which code may leave what it was traced with."""
    twin = object.__new__(type(module))
    own = vars(module).items()
    vars(twin).update({k: v.copy() if isinstance(v, (dict, list, set)) else v for k, v in own})
    return twin


def called(module: nn.Module, node: fx.Node | None) -> nn.Module | None:
    """The child that a node calls, or None."""
    return module.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def ancestors_in(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Everything that each node is computed from, itself included."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        found[node] = {node}.union(*(found[source] for source in node.all_input_nodes))
    return found


def factor_in(module: nn.Module, node: fx.Node, ancestors: dict[fx.Node, set[fx.Node]]) -> set[fx.Node] | None:
    """Of a product of x and something computed from x that squashes or pools it, the nodes of that; None for others.

    That is what attention is, whatever its class: ``x * sigmoid(fc(x.mean((2, 3))))``.
    """
    if node.target not in MULTIPLICATIONS or len(node.all_input_nodes) != 2:
        return None
    first, second = node.all_input_nodes
    if _unscaled(first) & ancestors[second]:
        x, factor = first, second
    elif _unscaled(second) & ancestors[first]:
        x, factor = second, first
    else:
        return None
    inside = ancestors[factor] - ancestors[x]
    return inside if _has_layers(module, inside) and any(_squashes_or_pools(module, n) for n in inside) else None


def _unscaled(node: fx.Node) -> set[fx.Node]:
    """A node, and if it is a product, what it is a product of: a map may be scaled several times."""
    found = {node}
    if node.target in MULTIPLICATIONS:
        found.update(*map(_unscaled, node.all_input_nodes))
    return found


def _has_layers(module: nn.Module, nodes: set[fx.Node]) -> bool:
    """Whether there is more than an activation, such as ``x * sigmoid(x)`` is."""
    children = [child for node in nodes if (child := called(module, node)) is not None]
    weights = any(next(child.parameters(), None) is not None or _pools(child) for child in children)
    return weights or any(node.op == "get_attr" or node.target in _POOLING_FUNCTIONS for node in nodes)


def _pools(child: nn.Module) -> bool:
    return any(isinstance(part, _POOLS) for part in child.modules())


def _squashes_or_pools(module: nn.Module, node: fx.Node) -> bool:
    child = called(module, node)
    if child is not None:
        return any(isinstance(part, (*_SQUASHING, *_POOLS)) for part in child.modules()) or _code_squashes(child)
    return node.target in _SQUASHING_FUNCTIONS or node.target in _POOLING_FUNCTIONS


def _code_squashes(child: nn.Module) -> bool:
    if next(child.children(), None) is None:
        return False
    graph = trace(child)
    return not isinstance(graph, str) and any(
        node.target in _SQUASHING_FUNCTIONS or node.target in _POOLING_FUNCTIONS for node in graph.nodes
    )


def factors_of(module: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Nodes of a module's code that serve attention in it alone."""
    ancestors = ancestors_in(graph)
    return set().union(*(factor_in(module, node, ancestors) or () for node in graph.nodes))


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a module scales what it gets by something that it computes of it: attention, known here or not."""
    if is_attention(module):
        return True
    if type(module).__module__.startswith("torch.nn.") or next(module.children(), None) is None:
        return False
    graph = trace(module)
    if isinstance(graph, str):
        return False
    inside = factors_of(module, graph)
    if not inside:
        return False
    outside = [called(module, node) for node in graph.nodes if node not in inside]
    return not any(child is not None and next(child.parameters(), None) is not None for child in outside)


def squashes(step: Any) -> bool:
    """Whether an activation, a module or a function, has bounds on both sides, as outputs and factors have."""
    return isinstance(step, _SQUASHING) if isinstance(step, nn.Module) else step in _SQUASHING_FUNCTIONS


def acts(module: nn.Module) -> bool:
    """Whether a module is an activation: torch's, timm's, or one that works on every value alone."""
    return is_activation(module) or _kind(module) == "activation"


def passes_on(module: nn.Module) -> bool:
    """Whether what a module returns outside training is its input."""
    return is_transparent(module) or _kind(module) == "identity"


def _kind(module: nn.Module) -> str | None:
    """What a module of unknown class without weights does, from what it does to numbers in two orders."""
    known = type(module).__module__.startswith(("torch.nn.", "torchvision.ops.", "timm.layers."))
    if known or any(p.numel() > 1 for p in module.parameters()) or next(module.buffers(), None) is not None:
        return None
    if isinstance(module, CONVOLUTIONS) or example_tensor(module).is_meta:
        return None
    like = example_tensor(module)
    x = torch.linspace(-4, 4, 96, dtype=like.dtype, device=like.device).reshape(2, 3, 4, 4)
    order = torch.arange(96, device=like.device) * 35 % 96
    try:
        twin = twin_of(module).eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]), without_hooks_on_all_modules():
            y = twin(x.clone())
            again = twin(x.flatten()[order].reshape(x.shape))
        if y.shape != x.shape or not torch.equal(y.flatten()[order], again.flatten()):
            return None
    except Exception:  # it wants something else
        return None
    return "identity" if torch.equal(y, x) else "activation"


def in_order(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers of a sequence and of the sequences in it, as they run."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if is_sequence(child):
            yield from ((f"{name}.{inner}", layer) for inner, layer in in_order(child))
        else:
            yield name, child


def is_sequence(module: nn.Module) -> bool:
    """Whether a module runs its children one after another, and nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
