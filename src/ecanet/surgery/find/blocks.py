"""Residual blocks of any network, and where their branches end.

Blocks whose code does not show where the branch ends are in :data:`BLOCKS`. All others are found by their code:
:mod:`torch.fx` traces each module without looking into its children. If the code adds two tensors, and one of them is
computed by more convolutions than the other, the module is a residual block.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ecanet.nn.norms import activation_inside, class_with_forward, is_norm
from ecanet.surgery.find.dry_run import Shapes
from ecanet.surgery.find.layers import (
    MERGES,
    count_convolutions,
    folds_later,
    is_attention,
    is_empty,
    is_transparent,
    merges_branches,
    out_channels,
    resolve,
)
from ecanet.surgery.find.traces import (
    MULTIPLICATIONS,
    ancestors_in,
    cannot_trace,
    looks_like_attention,
    multiplier_in,
    trace,
)

#: Where the branch of a block ends, by class name: for blocks that add a residual only sometimes or never.
BLOCKS: dict[str, str] = {
    "torchvision.models.mobilenetv2.InvertedResidual": "conv.-1",
    "torchvision.models.mobilenetv3.InvertedResidual": "block.-1",
    "torchvision.models.efficientnet.MBConv": "block.-1",
    "torchvision.models.efficientnet.FusedMBConv": "block.-1",
    "torchvision.models.mnasnet._InvertedResidual": "layers.-1",
    "torchvision.models.shufflenetv2.InvertedResidual": "branch2.-1",
    "torchvision.models.densenet._DenseLayer": "conv2",
    "timm.models.densenet.DenseLayer": "conv2",
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": "bn2",
    "timm.models._efficientnet_blocks.InvertedResidual": "bn3",
    "timm.models._efficientnet_blocks.EdgeResidual": "bn2",
    "timm.models._efficientnet_blocks.CondConvResidual": "bn3",
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": "pw_proj",
    "timm.models.rexnet.LinearBottleneck": "conv_pwl",
    "segmentation_models_pytorch.encoders._efficientnet.MBConvBlock": "_bn2",
}
#: Blocks whose output the network concatenates with other channels: a gate after the whole block would scale those too.
CONCATENATED_LATER = ("torchvision.models.densenet._DenseLayer", "timm.models.densenet.DenseLayer")

#: Blocks that concatenate their branch with other channels, so that they return more channels than the branch has.
WIDER_THAN_BRANCH = ("torchvision.models.shufflenetv2.InvertedResidual",)

_ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
#: Operations on a branch that leave it a branch: scaling of channels, dropout.
_SCALINGS: tuple[Any, ...] = (*MULTIPLICATIONS, F.dropout, F.dropout2d)


class Branch(NamedTuple):
    """A residual block and the end of its branch.

    Attributes:
        block: Name of the block.
        end: Name of the module that the branch ends with.
        channels: Number of channels that this module returns, or None if its layers do not show it.
        why_not: The reason if a gate cannot be put there.
    """

    block: str
    end: str
    channels: int | None
    why_not: str | None = None


class _Search(NamedTuple):
    """What a search for blocks needs to know, and what it has found and seen so far."""

    shapes: Mapping[nn.Module, Shapes]
    found: list[Branch]
    not_searched: dict[str, str]
    seen: set[nn.Module]


def find_blocks(
    model: nn.Module, shapes: Mapping[nn.Module, Shapes] | None = None
) -> tuple[list[Branch], dict[str, str]]:
    """Every residual block of a network, in the order of registration.

    Args:
        model: The network.
        shapes: Shapes from a dry run, if there was one.

    Returns:
        The blocks, and for each module that could not be searched the reason, by name.
    """
    search = _Search(shapes or {}, [], {}, set())
    _find_in(model, "", search)
    return search.found, search.not_searched


def _find_in(module: nn.Module, name: str, search: _Search) -> None:
    if module in search.seen or is_attention(module) or not count_convolutions(module):
        return
    search.seen.add(module)
    if merges_branches(module):
        if count_convolutions(module) > 1:  # a single convolution, such as YOLO's, is not a block
            search.not_searched[name] = MERGES
        return
    if name and looks_like_attention(module, search.shapes):
        graph = trace(module)
        if isinstance(graph, str):
            search.not_searched[name] = cannot_trace(graph)
        return
    if (cls := class_with_forward(module)) in BLOCKS:
        search.found.append(_known_block(module, name, BLOCKS[cls], search.shapes))
        return
    before = len(search.found)
    for child_name, child in module.named_children():
        _find_in(child, f"{name}.{child_name}" if name else child_name, search)
    if len(search.found) > before or type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        return  # only the innermost count: a skip connection around several blocks makes no block
    graph = trace(module)
    if isinstance(graph, str):
        search.not_searched[name] = cannot_trace(graph)
    else:
        search.found.extend(_residual_branches(module, name, graph, search.shapes))


def _known_block(block: nn.Module, name: str, path: str, shapes: Mapping[nn.Module, Shapes]) -> Branch:
    end_name, end = resolve(block, path)
    return _branch(name, end, f"{name}.{end_name}" if name else end_name, shapes)


def _branch(
    block: str, end: nn.Module, end_name: str, shapes: Mapping[nn.Module, Shapes], channels: int | None = None
) -> Branch:
    channels = out_channels(end) or channels
    last, last_name = end, end_name
    while isinstance(last, nn.Sequential) and not is_empty(last):
        key = next(key for key, child in reversed(last._modules.items()) if not is_empty(child))
        last, last_name = last.get_submodule(key), f"{last_name}.{key}"
    if looks_like_attention(last, shapes):
        remedy = "replace_gates_ swaps it" if is_attention(last) else "name the module before it"
        reason = f"the block has attention there, {last_name} ({type(last).__name__}): {remedy}"
        return Branch(block, last_name, channels, reason)
    norm, norm_name = _last_norm(end, end_name)
    return Branch(block, norm_name, channels) if norm is not None else Branch(block, end_name, channels)


def _last_norm(module: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The norm whose output a module returns, and its name; None if there is none."""
    while not is_norm(module):
        if folds_later(module):
            return None, name
        if isinstance(module, nn.Sequential):
            last = next((key for key, child in reversed(module._modules.items()) if not is_transparent(child)), None)
        else:
            last = _returned_child(module)
        if last is None:
            return None, name
        module, name = module.get_submodule(last), f"{name}.{last}"
    return (None, name) if activation_inside(module) else (module, name)


def _returned_child(module: nn.Module) -> str | None:
    if not any(True for _ in module.children()):
        return None
    graph = trace(module)
    if isinstance(graph, str):
        return None
    node: Any = next(iter(reversed(graph.nodes))).args[0]
    while isinstance(node, fx.Node) and node.op == "call_module":
        if not is_transparent(module.get_submodule(str(node.target))):
            return str(node.target)
        node = node.args[0]
    return None


def _residual_branches(
    module: nn.Module, name: str, graph: fx.Graph, shapes: Mapping[nn.Module, Shapes]
) -> Iterator[Branch]:
    ancestors = ancestors_in(graph)
    additions = {
        node: pair for node in graph.nodes if (pair := _branch_and_shortcut(module, node, ancestors)) is not None
    }
    # An addition within a branch, such as between Res2Net's channel groups, belongs to that branch.
    inside = {n for branch, shortcut in additions.values() for n in ancestors[branch] - ancestors[shortcut]}
    for node, (branch, _) in additions.items():
        if node not in inside:
            yield _branch_of(module, name, branch, shapes)


def _branch_and_shortcut(
    module: nn.Module, addition: fx.Node, ancestors: dict[fx.Node, set[fx.Node]]
) -> tuple[fx.Node, fx.Node] | None:
    """The two addends, the one with more convolutions first; None if this is not a residual addition."""
    if addition.target not in _ADDITIONS or len(addition.all_input_nodes) != 2 or len(addition.args) != 2:
        return None
    first, second = addition.all_input_nodes
    common = ancestors[first] & ancestors[second]
    # An argument with the default None: the caller may pass a shortcut.
    given = any(n.op == "placeholder" and n.args == (None,) for n in (first, second))
    if not given and (not common or all(n.op == "placeholder" and _is_indexed(n) for n in common)):
        return None
    counts = [
        sum(count_convolutions(module.get_submodule(str(n.target))) for n in nodes if n.op == "call_module")
        for nodes in (ancestors[first] - common, ancestors[second] - common)
    ]
    if counts[0] == counts[1]:
        return None
    return (first, second) if counts[0] > counts[1] else (second, first)


def _is_indexed(placeholder: fx.Node) -> bool:
    return any(user.target is operator.getitem for user in placeholder.users)


def _branch_of(module: nn.Module, name: str, node: fx.Node, shapes: Mapping[nn.Module, Shapes]) -> Branch:
    """The branch that ends in a node, with the last module of it."""
    passed: str | None = None
    prefix = f"{name}." if name else ""
    while True:
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            several = sum(n.op == "call_module" and n.target == node.target for n in node.graph.nodes) > 1
            if not is_transparent(child):
                if several:
                    reason = f"its branch ends in {node.target}, which it calls several times: name another module"
                    return Branch(name, prefix + str(node.target), None, reason)
                return _branch(name, child, prefix + str(node.target), shapes, _channels_before(module, node))
            passed = passed if several else str(node.target)
        elif node.target not in _SCALINGS:
            break
        if multiplier_in(module, node, ancestors_in(node.graph)) is not None:
            reason = "its branch ends in attention that its own code applies: name the module before that"
            return Branch(name, name, None, reason)
        tensors = [source for source in node.all_input_nodes if source.op != "get_attr" and not _is_weight(source)]
        if len(tensors) != 1:
            break
        node = tensors[0]
    if passed is not None:  # for example, a DropPath after a permutation
        return Branch(name, prefix + passed, _channels_before(module, node))
    return Branch(name, name, None, f"its branch ends in {node.target}, which is not a module: name a module before it")


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is computed from a parameter alone."""
    return bool(node.all_input_nodes) and all(n.op == "get_attr" or _is_weight(n) for n in node.all_input_nodes)


def _channels_before(module: nn.Module, node: fx.Node) -> int | None:
    """Channels of a node, read from the nearest module before it that has a number of channels."""
    while node.all_input_nodes or node.op == "call_module":
        if node.op == "call_module":
            channels = out_channels(module.get_submodule(str(node.target)))
            if channels is not None:
                return channels
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return None
