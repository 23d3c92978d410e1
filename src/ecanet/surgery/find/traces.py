"""What the code of one module shows: its graph, the attention in it, and which steps squash or pool."""

import inspect
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ecanet.surgery.find.activations import Piece, kind_of, values_of
from ecanet.surgery.find.dry_run import Shapes, first_line
from ecanet.surgery.find.equal import Answer, cached_by_module
from ecanet.surgery.find.layers import ACTIVATION_FUNCTIONS, CONVOLUTIONS, is_attention

MULTIPLICATIONS: tuple[Any, ...] = (
    *(operator.mul, operator.imul, torch.mul, torch.multiply),
    *("mul", "mul_", "multiply", "multiply_"),
)
_DIVISIONS: tuple[Any, ...] = (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div")
#: These multiply their last two tensor arguments.
_PRODUCTS_OF_LAST_TWO: tuple[Any, ...] = (
    torch.einsum,
    torch.addcmul,
    torch.lerp,
    "addcmul",
    "addcmul_",
    "lerp",
    "lerp_",
)
_SELECTIONS: tuple[Any, ...] = (operator.getitem, torch.chunk, torch.split, torch.tensor_split, "chunk", "split")
_CLAMPS: tuple[Any, ...] = (torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_")
_SQUASHING = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Softsign, nn.LogSigmoid, nn.Softmax, nn.Softmax2d)
_SOFTMAX: frozenset[Any] = frozenset({torch.softmax, F.softmax, "softmax"})
_SQUASHING_FUNCTIONS: frozenset[Any] = _SOFTMAX | {
    *(torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, F.hardsigmoid),
    *("sigmoid", "sigmoid_", "tanh", "tanh_"),
}
#: Shape of the map that an activation is tried on.
_TRIAL_SHAPE = (2, 3, 4, 4)
_POOLS = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_ADAPTIVE: frozenset[Any] = frozenset(
    {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d}
)
_REDUCTIONS: frozenset[Any] = frozenset(
    {
        *(torch.mean, torch.amax, torch.amin, torch.sum, torch.std, torch.var, torch.norm, torch.logsumexp),
        *(torch.linalg.norm, torch.linalg.vector_norm),
        *("mean", "amax", "amin", "sum", "std", "var", "norm", "logsumexp"),
    }
)
_POOLING_FUNCTIONS = _ADAPTIVE | _REDUCTIONS | {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.lp_pool2d}


class _ShallowTracer(fx.Tracer):
    """Traces the code of one module, without looking into its children.

    Attributes:
        gave_values: Whether the code got a tensor with values, such as a buffer. They may decide what it does.
    """

    gave_values = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat every child as a leaf."""
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Note whether an attribute that the code asks for is a tensor, and not a proxy."""
        given = super().getattr(attr, attr_val, parameter_proxy_cache)
        self.gave_values = self.gave_values or isinstance(given, Tensor)
        return given


@cached_by_module
def trace(module: nn.Module) -> Answer:
    """The graph (:class:`torch.fx.Graph`) of one module's own code, or a string that says why there is none.

    An argument whose default is a flag, a number or None keeps that default, so that the graph follows the default
    branches.
    """
    tracer = _ShallowTracer()
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
        defaults = {
            p.name: p.default for p in parameters if p.default is None or isinstance(p.default, (bool, int, str))
        }
        if defaults:
            return Answer(tracer.trace(_copy_for_tracing(module), concrete_args=defaults), not tracer.gave_values)
    except Exception:  # the code needs one of these arguments
        pass
    try:
        return Answer(tracer.trace(_copy_for_tracing(module)), not tracer.gave_values)
    except Exception as error:  # a module's code may do anything with a proxy
        return Answer(first_line(error), not tracer.gave_values)


def cannot_trace(why: str) -> str:
    """The reason that :func:`trace` returned in place of a graph, as reports phrase it."""
    return f"torch.fx cannot trace its code ({why})"


def _copy_for_tracing(module: nn.Module) -> nn.Module:
    """A copy with the same class, children and attributes, which receives whatever the code stores during tracing.

    It has no hooks on its calls, so that the graph is that of its own code, without a gate that is attached to it.
    """
    twin = object.__new__(type(module))
    own = vars(module).items()
    vars(twin).update({k: v.copy() if isinstance(v, (dict, list, set)) else v for k, v in own})
    twin._forward_hooks.clear()
    return twin


def called(module: nn.Module, node: fx.Node | None) -> nn.Module | None:
    """The child that a node calls, or None."""
    return module.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def ancestors_in(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Everything that each node is computed from, itself included."""
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        ancestors[node] = {node}.union(*(ancestors[source] for source in node.all_input_nodes))
    return ancestors


def multiplier_in(module: nn.Module, node: fx.Node, ancestors: dict[fx.Node, set[fx.Node]]) -> set[fx.Node] | None:
    """The nodes that compute the multiplier if a node is attention, or None.

    Attention, whatever its class, is a product of x and a multiplier that pools or squashes x:
    ``x * sigmoid(fc(x.mean((2, 3))))``. Both may be computed from the same map, as in GhostNetV2; then the
    multiplier is the one that has layers with weights and ends in a sigmoid.
    """
    pairs = list(_maps_and_multipliers(node))
    for x, multiplier in pairs:
        inside = ancestors[multiplier] - ancestors[x]
        enough = _has_weights if node.target in _DIVISIONS else _has_weights_or_pools  # x / x.norm() is not attention
        direct = bool(_origins(x) & ancestors[multiplier]) and enough(module, inside)
        if direct and any(_squashes_or_pools(module, n) for n in inside):
            return inside
    for x, multiplier in reversed(pairs):
        inside = ancestors[multiplier] - ancestors[x]
        joined = ancestors[x] & ancestors[multiplier]
        if joined and _has_weights(module, inside) and _is_between_0_and_1(module, multiplier):
            return inside
    return None


def _maps_and_multipliers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The possible (map, multiplier) pairs: both orders of a product; in a division the divisor is the multiplier."""
    tensors = node.all_input_nodes
    if (node.target in (*MULTIPLICATIONS, *_DIVISIONS) and len(tensors) == 2) or (
        node.target in _PRODUCTS_OF_LAST_TWO and len(tensors) >= 2
    ):
        first, second = tensors[-2:]
        yield first, second
        if node.target not in _DIVISIONS:
            yield second, first


def _origins(node: fx.Node) -> set[fx.Node]:
    """A node, and the nodes that it is a product or a slice of, step by step: a map may be scaled several times."""
    origins = {node}
    if node.target in MULTIPLICATIONS or node.target in _SELECTIONS:
        origins.update(*map(_origins, node.all_input_nodes))
    return origins


def _has_weights_or_pools(module: nn.Module, nodes: set[fx.Node]) -> bool:
    """Whether nodes use weights or pool; those of an activation such as ``x * sigmoid(x)`` do neither."""
    children = [child for node in nodes if (child := called(module, node)) is not None]
    return _has_weights(module, nodes) or (
        any(_pools(child) for child in children) or any(node.target in _POOLING_FUNCTIONS for node in nodes)
    )


def _has_weights(module: nn.Module, nodes: set[fx.Node]) -> bool:
    children = [child for node in nodes if (child := called(module, node)) is not None]
    weights = any(next(child.parameters(), None) is not None for child in children)
    return weights or any(node.op == "get_attr" for node in nodes)


def _pools(child: nn.Module) -> bool:
    return any(isinstance(part, _POOLS) or kind_of(part) == "pooling" for part in child.modules())


def _squashes_or_pools(module: nn.Module, node: fx.Node) -> bool:
    child = called(module, node)
    if child is None:
        return node.target in _POOLING_FUNCTIONS or _node_squashes(node)
    return _pools(child) or any(squashes(part) or _code_squashes_or_pools(part) for part in child.modules())


def _node_squashes(node: fx.Node) -> bool:
    """Whether a function squashes: ``clamp`` with two bounds and ``1 / (1 + exp(-x))`` do, too."""
    if node.target in _CLAMPS:
        bounds = [*node.args[1:], *node.kwargs.values()]
        return len(bounds) == 2 and None not in bounds
    if node.target in (torch.exp, "exp"):  # exp in a divisor, as in 1 / (1 + exp(-x))
        above = [user for user in node.users if user.target in (operator.add, torch.add, "add")]
        return any(user.target in (*_DIVISIONS, torch.reciprocal, "reciprocal") for n in above for user in n.users)
    return squashes(node.target)


def _code_squashes_or_pools(part: nn.Module) -> bool:
    if type(part).__module__.startswith("torch.nn.") or next(part.children(), None) is None:
        return False
    graph = trace(part)
    return not isinstance(graph, str) and any(
        node.op != "call_module" and (node.target in _POOLING_FUNCTIONS or _node_squashes(node)) for node in graph.nodes
    )


def _is_between_0_and_1(module: nn.Module, node: fx.Node) -> bool:
    """Whether the last step that changes values (rather than moving them) leaves them between 0 and 1."""
    while True:
        child = called(module, node)
        if child is not None and is_sequence(child):
            child = next(iter(reversed([layer for _, layer in in_order(child)])), None)
        step = node.target if child is None else child
        bounds = _bounds(step)
        if bounds is not None and bounds[0] >= 0 and bounds[1] <= 1:
            return True
        if not node.all_input_nodes or (child is not None and next(child.parameters(), None) is not None):
            return False
        node = node.all_input_nodes[0]


def multipliers_of(module: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a module's code that only compute multipliers of attention."""
    ancestors = ancestors_in(graph)
    return set().union(*(multiplier_in(module, node, ancestors) or () for node in graph.nodes))


def looks_like_attention(module: nn.Module, shapes: Mapping[nn.Module, Shapes] | None = None) -> bool:
    """Whether a module scales its input by a multiplier that it computes from it: attention, of a known class or not.

    Args:
        module: The module.
        shapes: Shapes from a dry run, if there was one; they are used if the code cannot be traced.
    """
    if is_attention(module):
        return True
    if type(module).__module__.startswith("torch.nn.") or next(module.children(), None) is None:
        return False
    graph = trace(module)
    if isinstance(graph, str):
        return _may_be_attention(module, shapes or {})
    inside = multipliers_of(module, graph)
    if not inside:
        return False
    outside = [called(module, node) for node in graph.nodes if node not in inside]
    return not any(child is not None and next(child.parameters(), None) is not None for child in outside)


def _may_be_attention(module: nn.Module, shapes: Mapping[nn.Module, Shapes]) -> bool:
    """Whether a module whose code cannot be traced may be attention.

    Its output must have its input's shape, and its layers must look as if they computed a multiplier: some return one
    position or one channel, and the others fewer channels than the input has; or all layers are pointwise, and there
    is a sigmoid inside.
    """
    own = shapes.get(module)
    if own is not None and (own.input is None or own.input != own.output or is_pooled(own.output)):
        return False
    layers = [m for m in module.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    if not layers:
        return False
    pointwise = all(isinstance(m, nn.Linear) or set(m.kernel_size) == {1} for m in layers)
    if pointwise and (own is None or any(squashes(m) for m in module.modules())):
        return True
    if own is None or own.input is None:
        return False
    outputs = [shapes[m].output for m in layers if m in shapes]
    small = [o for o in outputs if o is None or is_pooled(o) or o[1] == 1]
    return bool(small) and all(o in small or o[1] < own.input[1] for o in outputs if o is not None)


def is_pooled(shape: torch.Size | None) -> bool:
    """Whether a map (N, C, *spatial) has one position."""
    return shape is not None and shape[2:].numel() == 1


def squashes(step: Any, shape: Sequence[int] | None = None) -> bool:
    """Whether an activation (module, function or code) is bounded on both sides, as a sigmoid is.

    Args:
        step: The activation.
        shape: Shape of the maps that it takes, if that is known.
    """
    return isinstance(step, _SQUASHING) or _bounds(step, shape) is not None


def _bounds(step: Any, shape: Sequence[int] | None = None) -> tuple[float, float] | None:
    """The least and greatest value of an activation, from what it returns for numbers; None if it is unbounded."""
    if isinstance(step, (nn.Softmax, nn.Softmax2d)) or step in _SOFTMAX:
        return 0.0, 1.0
    if isinstance(step, Piece):
        step = step.as_module()
    if isinstance(step, nn.Module):
        if kind_of(step, shape) != "activation":
            return None
        call: Any = step
    elif step in ACTIVATION_FUNCTIONS or step in _SQUASHING_FUNCTIONS:
        call = getattr(Tensor, step) if isinstance(step, str) else step
    else:
        return None
    shape = _TRIAL_SHAPE if shape is None else shape
    ends = [torch.linspace(-end, end, math.prod(shape)).reshape(*shape) for end in (100.0, 1000.0)]
    try:
        near, far = (values_of(call, x) for x in ends)
    except Exception:  # it does not take such a map
        return None
    if near is None or far is None:
        return None
    low, high = float(near.min()), float(near.max())
    room = 0.05 * (high - low)
    return (low, high) if low < high and far.min() >= low - room and far.max() <= high + room else None


def pools_globally(step: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether a layer, or a function with these arguments, leaves one position of a map."""
    kwargs = kwargs or {}
    if isinstance(step, _POOLS):
        return _is_one(step.output_size)
    if isinstance(step, nn.Module):
        return kind_of(step) == "pooling"
    if step in _ADAPTIVE:
        return _is_one(args[1] if len(args) > 1 else kwargs.get("output_size"))
    dims = next((v for v in (*args[1:], kwargs.get("dim"), kwargs.get("axis")) if isinstance(v, (tuple, list))), ())
    return step in _REDUCTIONS and len(dims) > 1 and all(isinstance(d, int) and d not in (0, 1) for d in dims)


def _is_one(size: Any) -> bool:
    return size == 1 or (isinstance(size, (tuple, list)) and set(size) == {1})


def in_order(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers of nested sequences, in the order in which they run."""
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
