"""Groups of convolution, norm and activation, as plain networks (VGG, U-Net) and YOLO are made of."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from torch import fx, nn

from ecanet.nn.norms import activation_inside, is_norm
from ecanet.surgery.blocks import trace
from ecanet.surgery.layers import (
    ACTIVATION_FUNCTIONS,
    CONVOLUTIONS,
    is_activation,
    is_attention,
    is_transparent,
)


def find_groups(model: nn.Module, names: dict[nn.Module, list[str]]) -> dict[str, int]:
    """The module after which each group of convolution, optional norm and activation is complete: name and channels.

    It is the activation; the norm before it where the activation is a function or a module that several groups share
    (a gate is positive, so before a ReLU it scales the same); the module that holds the group and nothing else where
    there is one, such as YOLO's ``Conv``. What a sequence computes of globally pooled features is no map and no group.

    Args:
        model: The network.
        names: Its modules' names, as :func:`ecanet.surgery.layers.names_of` gives them.
    """
    found: dict[str, int] = {}
    _search(model, "", names, found)
    return found


def _search(module: nn.Module, name: str, names: dict[nn.Module, list[str]], found: dict[str, int]) -> None:
    if is_attention(module):
        return
    prefix = f"{name}." if name else ""
    if isinstance(module, nn.Sequential):
        found.update((prefix + end, channels) for end, channels in _in_sequence(module, names))
    elif any(_convolution(child) for child in module.children()):
        graph = trace(module)
        if not isinstance(graph, str):
            ends = dict(_in_graph(module, graph, names))
            found.update((name if end == "" else prefix + end, channels) for end, channels in ends.items())
            if "" in ends:
                return
    for child_name, child in _before_global_pooling(module) if isinstance(module, nn.Sequential) else _children(module):
        _search(child, prefix + child_name, names, found)


def _before_global_pooling(module: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    pools = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
    return takewhile(lambda c: not (isinstance(c[1], pools) and c[1].output_size in (1, (1, 1))), _children(module))


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return module.named_children()


def _in_sequence(module: nn.Sequential, names: dict[nn.Module, list[str]]) -> Iterator[tuple[str, int]]:
    layers = [(name, child) for name, child in _before_global_pooling(module) if not is_transparent(child)]
    for i, (name, layer) in enumerate(layers):
        convolution = _convolution(layer)
        if convolution is None:
            continue
        end = name
        after = layers[i + 1 :]
        if after and is_norm(after[0][1]):
            end, norm = after.pop(0)
            if activation_inside(norm):
                yield end, convolution.out_channels
                continue
        if after and is_activation(after[0][1]):
            yield after[0][0] if len(names[after[0][1]]) == 1 else end, convolution.out_channels


def _in_graph(module: nn.Module, graph: fx.Graph, names: dict[nn.Module, list[str]]) -> Iterator[tuple[str, int]]:
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        convolution = _convolution(_called(module, node))
        if convolution is None:
            continue
        end, complete = str(node.target), False
        node = _next(module, node)
        child = _called(module, node)
        if child is not None and is_norm(child):
            end, complete = str(node.target), activation_inside(child)
            node = _next(module, node)
            child = _called(module, node)
        if not complete and child is not None and is_activation(child):
            alone = len(names[child]) == 1 and calls.count(str(node.target)) == 1
            end, complete = str(node.target) if alone else end, True
            node = _next(module, node)
        elif not complete and node is not None and node.target in ACTIVATION_FUNCTIONS:
            complete = True
            node = _next(module, node)
        if complete:
            only = sum(_convolution(child) is not None for child in module.children()) == 1
            alone = only and node is not None and node.op == "output" and names[module] != [""]
            yield "" if alone else end, convolution.out_channels


def _convolution(module: nn.Module | None) -> Any:
    """The convolution that a module is or, as separable ones do, a sequence ends with; None without one."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return module if isinstance(module, CONVOLUTIONS) else None


def _next(module: nn.Module, node: fx.Node | None) -> Any:
    """What alone reads a node, past what is transparent; None if several do."""
    while node is not None:
        users = list(node.users)
        node = users[0] if len(users) == 1 else None
        child = _called(module, node)
        if child is None or not is_transparent(child):
            return node
    return None


def _called(module: nn.Module, node: fx.Node | None) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None
