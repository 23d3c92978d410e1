"""Finds what a layer or a piece of code does to the values of a map, by running it on known numbers."""

import inspect
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ecanet.networks.copies import twin_of
from ecanet.networks.running import example_tensor, without_hooks_on_all_modules
from ecanet.nn.norms import is_norm
from ecanet.surgery.find.dry_run import first_line
from ecanet.surgery.find.layers import CONVOLUTIONS, is_activation, is_attention, is_transparent

#: "scaling" is ``a x + b`` with one a and b for each channel, such as a layer scale or a norm in eval mode; "mixing"
#: returns a map of the same shape in which a value depends on several values of the input.
Kind: TypeAlias = Literal["activation", "identity", "scaling", "mixing", "pooling", "other"]

_LIBRARIES = ("torch.nn.", "torchvision.ops.", "timm.layers.")
#: Layers that combine several values into one.
_COMBINING_LAYERS = (*CONVOLUTIONS, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
#: Shape of the map that a step is tried on. The channels are those of its parameters if it has any.
_TRIAL_SHAPE = (2, 3, 4, 4)
#: Layers with a larger parameter are not tried: a parameter with one value per channel is smaller.
_MAX_PARAMETER_SIZE = 8192
_DROPOUTS: frozenset[Any] = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
)


class Piece(NamedTuple):
    """A piece of a module's code that computes one tensor from another.

    Attributes:
        module: The module whose code it is.
        entry: The node that it is computed from.
        nodes: The nodes that compute it, in order.
        end: The node that is the result: the last one, or the entry if the code writes into it.
    """

    module: nn.Module
    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    end: fx.Node

    def name(self) -> str:
        """Name of the last function in it."""
        target = self.nodes[-1].target
        return target.rpartition(".")[2] if isinstance(target, str) else getattr(target, "__name__", str(target))

    def as_module(self) -> nn.Module:
        """A module that does the same in eval mode."""
        graph = fx.Graph()
        copies = {self.entry: graph.placeholder("x")}

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:  # a weight, or computed from weights alone
                copies[node] = graph.node_copy(node, copied)
            return copies[node]

        for node in self.nodes:
            if node.target in _DROPOUTS:
                copies[node] = copied(node.all_input_nodes[0])
            elif "training" in copied(node).kwargs:
                copied(node).update_kwarg("training", False)
        graph.output(copied(self.end))
        return _RunsGraph(fx.GraphModule(self.module, graph))


class _RunsGraph(nn.Module):
    """Runs a graph through its ``forward``. Called as a module, a graph would print its errors."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Any:
        return self.graph.forward(x)


def next_piece(module: nn.Module, node: fx.Node, passed: Collection[fx.Node] = ()) -> Piece | None:
    """The shortest piece of code that depends on a node alone, and whose result is all that later code uses of it.

    ``x * sigmoid(x)`` is one; so is ``relu_(x)``, whether or not its result is used. None if the code uses other
    tensors or layers with weights.

    Args:
        module: The module whose code it is.
        node: A node of that code.
        passed: Users of the node to ignore.
    """
    users = [user for user in node.users if user not in passed]
    if users and not users[0].users and _writes(module, users[0]):
        return Piece(module, node, (users[0],), node)
    inside: list[fx.Node] = []
    following = node.next
    while following.op not in ("root", "output"):
        sources = [n for n in following.all_input_nodes if not _is_constant(n)]
        if following not in passed and any(n is node or n in inside for n in sources):
            child = module.get_submodule(str(following.target)) if following.op == "call_module" else None
            if not all(n is node or n in inside for n in sources) or (
                child is not None and _has_combining_layers(child)
            ):
                return None
            inside.append(following)
            if all(user in inside or user in passed for n in (node, *inside[:-1]) for user in n.users):
                return Piece(module, node, tuple(inside), following)
        following = following.next
    return None


def readers_of(module: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The users of a node, except those that only write into it and whose result is unused."""
    return [user for user in node.users if user.users or user.op == "output" or not _writes(module, user)]


def _writes(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node writes into its input."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return False
    return (
        node.kwargs.get("inplace") is True
        or (node.op == "call_function" and _has_positional_inplace(node))
        or (name.endswith("_") and not name.endswith("__"))
        or node.target in (operator.imul, operator.iadd, operator.isub, operator.itruediv)
    )


def _has_positional_inplace(node: fx.Node) -> bool:
    """Whether a function got ``inplace=True`` as a positional argument."""
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return "inplace" in names[: len(node.args)] and node.args[names.index("inplace")] is True


def _is_constant(node: fx.Node) -> bool:
    """Whether a node is a weight, or computed from weights alone."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.op != "get_attr":
            if node.op in ("placeholder", "call_module") or not node.all_input_nodes:
                return False
            waiting += node.all_input_nodes
    return True


def _has_combining_layers(module: nn.Module) -> bool:
    return any(isinstance(part, _COMBINING_LAYERS) or is_norm(part) or is_attention(part) for part in module.modules())


def acts(module: nn.Module) -> bool:
    """Whether a module is an activation: torch's, timm's, or any that computes each value from one value."""
    return kind_of(module) == "activation"


def kind_of(step: nn.Module | Piece, shape: Sequence[int] | None = None) -> Kind:
    """What a module, or a piece of code, does to the values of a map.

    Args:
        step: The module, or the code.
        shape: Shape of the maps that it takes; by default ``(2, C, 4, 4)``, with C read from its parameters.
    """
    return _kind_and_reason(step, shape)[0]


def why_unknown(step: nn.Module | Piece, shape: Sequence[int]) -> str | None:
    """Why it is unknown what a custom layer does; None if it is known."""
    return _kind_and_reason(step, shape)[1]


def _kind_and_reason(step: nn.Module | Piece, shape: Sequence[int] | None) -> tuple[Kind, str | None]:
    if isinstance(step, Piece):
        try:
            step = step.as_module()
        except Exception as error:
            return "other", first_line(error)
    if is_transparent(step):
        return "identity", None
    if is_activation(step):
        return "activation", None
    if type(step).__module__.startswith(_LIBRARIES) or _has_combining_layers(step):
        return "other", None
    own = list(_tensors(step))
    if any(t.numel() > _MAX_PARAMETER_SIZE for t in own):
        return "other", None
    if any(t.is_meta for t in own):
        return "other", "its weights have no values"
    shape = (
        (*_TRIAL_SHAPE[:1], max([t.numel() for t in own if t.numel() > 1], default=3), *_TRIAL_SHAPE[2:])
        if shape is None
        else shape
    )
    try:
        return _kind_from_outputs(step, tuple(shape)), None
    except Exception as error:
        return "other", first_line(error)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _kind_from_outputs(module: nn.Module, shape: tuple[int, ...]) -> Kind:
    """Find the kind by calls: on known numbers, on the same reordered, with some changed, and with random weights."""
    n, channels = shape[:2]
    places = n * torch.Size(shape[2:]).numel()
    line = torch.linspace(-4, 4, places)

    def as_map(values: Tensor) -> Tensor:  # (places, C)
        return values.reshape(n, -1, channels).transpose(1, 2).reshape(shape)

    def as_values(y: Tensor) -> Tensor:
        return y.reshape(n, channels, -1).transpose(1, 2).reshape(places, channels)

    index = (torch.arange(places)[:, None] + 5 * torch.arange(channels)) % places  # each channel starts elsewhere
    x = line[index]
    y = values_of(module, as_map(x))
    if y is None or not y.is_floating_point():
        return "other"
    if tuple(y.shape[:2]) == shape[:2] and y.numel() == n * channels != places * channels:
        return "pooling"
    if tuple(y.shape) != shape:
        return "other"
    order = torch.arange(places) * 35 % places  # places is a power of 2
    changed = (torch.arange(places)[:, None] * 7 + torch.arange(channels) * 3) % 5 < 2
    reordered = values_of(module, as_map(x[order]))
    partly_changed = values_of(module, as_map(torch.where(changed, 2.5 - x, x)))
    if reordered is None or partly_changed is None:
        return "other"
    y, reordered, partly_changed = (as_values(t).float() for t in (y, reordered, partly_changed))
    if not _same(reordered, y[order]) or not _same(partly_changed[~changed], y[~changed]):
        return "mixing"
    tried = [y]
    if _is_straight(y, index) and next(module.parameters(), None) is not None:
        # It could be a PReLU whose slope is still 1: try other weights.
        other = values_of(module, as_map(x), other_weights=True)
        tried += [] if other is None else [as_values(other).float()]
    if not all(_is_straight(t, index) for t in tried):
        return "activation"
    return "identity" if all(_same(t, x.to(t)) for t in tried) else "scaling"


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def _is_straight(y: Tensor, index: Tensor) -> bool:
    """Whether outputs ``(places, C)`` for evenly spaced inputs are on a line in every channel.

    NaN counts as not on a line.
    """
    line = torch.empty_like(y).scatter_(0, index, y)
    bend = line[2:] - 2 * line[1:-1] + line[:-2]
    return bool((bend.abs() <= 1e-3 * (line.amax(0) - line.amin(0)) / len(line) + 1e-5 * line.abs().amax()).all())


def values_of(call: Any, x: Tensor, *, other_weights: bool = False) -> Tensor | None:
    """What a module or a function returns for a map, in eval mode and without hooks; None if that is not a tensor.

    Args:
        call: The module or function.
        x: The map.
        other_weights: Draw the weights at random, because the present ones may hide what the module does.
    """
    like, x = x, x.clone()
    twin = None
    if isinstance(call, nn.Module):
        like, twin = example_tensor(call), twin_of(call).eval()
    x = x.to(device=like.device, dtype=like.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), without_hooks_on_all_modules():
        if twin is None:
            y = call(x)
        else:
            weights = {}
            if other_weights:
                torch.manual_seed(0)
                weights = {
                    name: 0.25 + 0.5 * torch.rand_like(t)
                    for name, t in twin.named_parameters()
                    if t.is_floating_point()
                }
            y = torch.func.functional_call(twin, weights, (x,))
    return y if isinstance(y, Tensor) else None
