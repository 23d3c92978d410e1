"""Groups of convolution, norm and activation, the units of plain networks (VGG, U-Net) and of YOLO."""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from torch import fx, nn

from ecanet.nn.norms import activation_inside, is_norm
from ecanet.surgery.find.activations import Kind, Piece, acts, kind_of, next_piece, readers_of, why_unknown
from ecanet.surgery.find.dry_run import Shapes
from ecanet.surgery.find.layers import CONVOLUTIONS, MERGES, count_convolutions, is_attention, merges_branches
from ecanet.surgery.find.traces import (
    called,
    cannot_trace,
    in_order,
    is_sequence,
    looks_like_attention,
    multipliers_of,
    pools_globally,
    squashes,
    trace,
)


class Groups(NamedTuple):
    """Where groups end.

    Attributes:
        ends: For each group the name of the module that ends it, and its number of channels.
        left_out: What was left out, and why.
    """

    ends: dict[str, int]
    left_out: list[str]


class _Part(NamedTuple):
    """A module of the network, with what the search needs to know and where it collects its results.

    Attributes:
        module: The module.
        name: Its name; empty for the network itself.
        is_output: Whether no layer with weights follows it in the network.
        names: The names of all modules.
        shapes: Shapes from a dry run; empty if there was none.
        groups: What was found so far.
    """

    module: nn.Module
    name: str
    is_output: bool
    names: dict[nn.Module, list[str]]
    shapes: Mapping[nn.Module, Shapes]
    groups: Groups

    @property
    def prefix(self) -> str:
        """What the names of its children start with."""
        return f"{self.name}." if self.name else ""

    def child(self, name: str, module: nn.Module, is_output: bool) -> "_Part":
        """A module inside it."""
        return self._replace(module=module, name=self.prefix + name, is_output=is_output)


class _Step(NamedTuple):
    """One call in a chain of calls.

    Attributes:
        name: Name of the module that is called; empty for a piece of code.
        what: The module or the code.
        is_shared: Whether it is called elsewhere, too.
    """

    name: str
    what: nn.Module | Piece
    is_shared: bool = False


def find_groups(
    model: nn.Module, names: dict[nn.Module, list[str]], shapes: Mapping[nn.Module, Shapes] | None = None
) -> Groups:
    """The module that ends each group of convolution, optional norm and activation: name and channels.

    This is the activation. If the activation is code, or a module that several groups share, it is the norm before it
    (a gate is positive, so it scales the same before a ReLU). If a module holds the group and nothing else, such as
    YOLO's ``Conv``, it is that module.

    These are not groups: layers after a global pooling, layers inside attention, and a convolution whose sigmoid or
    tanh makes the network's output.

    Args:
        model: The network.
        names: Its modules' names, as :func:`ecanet.surgery.find.layers.names_of` gives them.
        shapes: Shapes from a dry run, if there was one.
    """
    groups = Groups({}, [])
    _find_in(_Part(model, "", True, names, shapes or {}, groups))
    return groups


def _find_in(part: _Part) -> None:
    """Find groups in a module and its children."""
    if part.name and looks_like_attention(part.module, part.shapes):
        _leave_out_attention(part)
    elif part.name and merges_branches(part.module):
        _add_if_a_group(part)
    elif is_sequence(part.module):
        _find_in_sequence(part)
    else:
        _find_in_code_and_children(part)


def _leave_out_attention(part: _Part) -> None:
    module, left_out = part.module, part.groups.left_out
    if not any(isinstance(layer, CONVOLUTIONS) for layer in module.modules()):
        return
    what = f"{part.name} is attention ({type(module).__name__})"
    graph = "" if is_attention(module) else trace(module)
    if isinstance(graph, str) and graph:
        what += f", as far as its layers show: {cannot_trace(graph)}"
    left_out.append(what)


def _find_in_sequence(part: _Part) -> None:
    layers = list(_before_global_pooling(part.module))
    steps = [_Step(name, layer, len(part.names[layer]) > 1) for name, layer in layers]
    are_last = [
        part.is_output and not any(_has_weights(later) for _, later in layers[i + 1 :]) for i in range(len(layers))
    ]
    for i, (_, layer) in enumerate(layers):
        if isinstance(layer, CONVOLUTIONS):
            _add(part, _group(part, steps[i:]), are_last[i])
    for (name, layer), is_last in zip(layers, are_last, strict=True):
        _find_in(part.child(name, layer, is_last))


def _find_in_code_and_children(part: _Part) -> None:
    module, left_out = part.module, part.groups.left_out
    graph = trace(module) if count_convolutions(module) else ""
    in_attention: set[str] = set()  # names of children
    last_children: set[str] | None = None  # None: any may be the last
    if not isinstance(graph, str):
        if _add_groups_in_code(part, graph):
            return
        in_attention = {str(node.target) for node in multipliers_of(module, graph) if node.op == "call_module"}
        last_children = {str(node.target).split(".")[0] for node in _without_layers_after(module, graph)}
    elif graph and any(isinstance(child, CONVOLUTIONS) for child in module.children()):
        left_out.append(f"{part.name or 'the network itself'}: {cannot_trace(graph)}")
    for name, child in module.named_children():
        if name in in_attention:
            if any(isinstance(layer, CONVOLUTIONS) for layer in child.modules()):
                left_out.append(f"{part.prefix}{name} is part of attention in {part.name or 'the network'}'s code")
        elif isinstance(graph, str) and graph and _may_be_a_multiplier(child, part.shapes):
            left_out.append(f"{part.prefix}{name} may be part of attention: {cannot_trace(graph)}")
        else:
            _find_in(part.child(name, child, part.is_output and (last_children is None or name in last_children)))


def _may_be_a_multiplier(child: nn.Module, shapes: Mapping[nn.Module, Shapes]) -> bool:
    """Whether code that cannot be traced may scale a map by a child's output: it has one channel or is bounded."""
    if not is_sequence(child) or not any(isinstance(part, CONVOLUTIONS) for part in child.modules()):
        return False
    seen = shapes.get(child)
    one_channel = seen is not None and (seen.output or ())[1:2] == (1,) != (seen.input or ())[1:2]
    return one_channel or squashes([layer for _, layer in in_order(child)][-1])


def _add_if_a_group(part: _Part) -> None:
    """Add a module that can merge its layers if it is one group, such as YOLO's ``Conv``: a gate is safe after it."""
    graph, alone = trace(part.module), part._replace(groups=Groups({}, []))
    if not isinstance(graph, str) and _add_groups_in_code(alone, graph):
        part.groups.ends.update(alone.groups.ends)
        part.groups.left_out.extend(alone.groups.left_out)
    elif count_convolutions(part.module):
        part.groups.left_out.append(f"{part.name}: {MERGES}")


def _add_groups_in_code(part: _Part, graph: fx.Graph) -> bool:
    """Add the groups that a module's code shows; return whether the module as a whole is one."""
    module = part.module
    inside = multipliers_of(module, graph)
    last_nodes = _without_layers_after(module, graph) if part.is_output else set()
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node in inside or node.op != "call_module" or _is_pooled(module, node):
            continue
        own = _steps(part, node, calls)
        for i, step in enumerate(own):
            if not isinstance(step.what, CONVOLUTIONS):
                continue
            following = [(n, s) for call, n in _chain_after(module, node) for s in _steps(part, call, calls)]
            group = _group(part, [*own[i:], *(s for _, s in following)])
            if group is None:
                continue
            nodes = [node] * len(own[i:]) + [n for n, _ in following]
            end_node = nodes[group.length - 1]
            only = count_convolutions(module) == 1 and part.name != ""
            if only and group.length == len(nodes) and _is_returned(module, end_node):
                if not _is_the_output(part, group, part.name, end_node in last_nodes):
                    part.groups.ends[part.name] = group.shape[1]
                return True
            _add(part, group, end_node in last_nodes)
    return False


class _Group(NamedTuple):
    end: str  # name of the module that ends it
    length: int  # number of its steps
    act: nn.Module | Piece
    shape: tuple[int, ...]  # of the maps that the activation takes


def _group(part: _Part, steps: list[_Step]) -> _Group | None:
    """The group that starts with the first step, a convolution; None if no activation ends it."""
    convolution: Any = steps[0].what
    left_out = part.groups.left_out
    shape = (2, convolution.out_channels, *(4 for _ in convolution.kernel_size))
    end, seen_norm = steps[0].name, False
    mixing: nn.Module | Piece | None = None
    for i, step in enumerate(steps[1:], 2):
        kind: Kind
        if isinstance(step.what, nn.Module) and is_norm(step.what):
            if seen_norm:
                break
            end, seen_norm = step.name, True
            kind = "activation" if activation_inside(step.what) else "scaling"
        else:
            kind = kind_of(step.what, shape)
            if kind == "scaling" and isinstance(step.what, nn.Module) and any(True for _ in step.what.parameters()):
                end, seen_norm = step.name, True  # for example, a custom norm
        if kind == "mixing" and mixing is None:
            mixing = step.what
        elif kind == "activation" and mixing is not None:
            left_out.append(
                f"{part.prefix}{end}: {_label(mixing)} between it and {_label(step.what)} is not a known norm"
            )
            return None
        elif kind == "activation":
            return _Group(end if step.is_shared or not step.name else step.name, i, step.what, shape)
        elif kind in ("pooling", "other"):
            why = why_unknown(step.what, shape)
            if why is not None:
                left_out.append(
                    f"{part.prefix}{end}: whether {_label(step.what)} after it is an activation is unknown ({why})"
                )
            break
    if isinstance(mixing, nn.Module):
        left_out.append(
            f"{part.prefix}{end}: {_label(mixing)} after it works on several values at a time: it is not an activation"
        )
    return None


def _label(act: nn.Module | Piece) -> str:
    return act.name() if isinstance(act, Piece) else type(act).__name__


def _add(part: _Part, group: _Group | None, is_last: bool) -> None:
    if group is not None and not _is_the_output(part, group, part.prefix + group.end, is_last):
        part.groups.ends[part.prefix + group.end] = group.shape[1]


def _is_the_output(part: _Part, group: _Group, name: str, is_last: bool) -> bool:
    if not (is_last and squashes(group.act, group.shape)):
        return False
    part.groups.left_out.append(f"{name}: its {_label(group.act)} makes the network's output")
    return True


def _before_global_pooling(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return takewhile(lambda layer: not pools_globally(layer[1]), in_order(module))


def _is_pooled(module: nn.Module, node: fx.Node) -> bool:
    """Whether the map that a node works on went through a global pooling."""
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        child = called(module, node)
        if pools_globally(node.target, node.args, node.kwargs) if child is None else pools_globally(child):
            return True
    return False


def _has_weights(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None and not is_norm(layer) and not acts(layer)


def _steps(part: _Part, call: fx.Node | Piece, calls: list[str]) -> list[_Step]:
    """The steps of a call; one for each layer if it calls a sequence."""
    if isinstance(call, Piece):
        return [_Step("", call)]
    child = part.module.get_submodule(str(call.target))
    several = calls.count(str(call.target)) > 1
    if not is_sequence(child):
        return [_Step(str(call.target), child, several or len(part.names[child]) > 1)]
    layers = _before_global_pooling(child)
    return [_Step(f"{call.target}.{name}", layer, several or len(part.names[layer]) > 1) for name, layer in layers]


def _chain_after(module: nn.Module, node: fx.Node) -> Iterator[tuple[fx.Node | Piece, fx.Node]]:
    """The chain of modules and pieces of code after a node, each with the node of its result.

    Each uses only the result of the one before, and nothing else uses that result. Code that writes into its input has
    the input's node as its result.
    """
    passed: set[fx.Node] = set()
    while True:
        readers = [user for user in node.users if user not in passed]
        if len(readers) == 1 and readers == readers_of(module, node) and _calls_alone(readers[0], node):
            node = readers[0]
            yield node, node
            continue
        piece = next_piece(module, node, passed)
        if piece is None:
            return
        passed.update(piece.nodes)
        node = piece.end
        yield piece, node


def _calls_alone(call: fx.Node, node: fx.Node) -> bool:
    return call.op == "call_module" and call.all_input_nodes == [node]


def _is_returned(module: nn.Module, node: fx.Node) -> bool:
    readers = readers_of(module, node)
    return len(readers) == 1 and readers[0].op == "output"


def _without_layers_after(module: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a module's code that no layer with weights follows."""
    last_nodes: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if all(
            user.op == "output"
            or (user in last_nodes and ((child := called(module, user)) is None or not _has_weights(child)))
            for user in node.users
        ):
            last_nodes.add(node)
    return last_nodes
