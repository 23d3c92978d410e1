"""A copy of a network for inference: norms folded into convolutions, tails in place."""

import copy
import operator
from collections import Counter
from inspect import unwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from ecanet.networks.checks import check_model
from ecanet.nn import Gate
from ecanet.nn.attached import attached_gate
from ecanet.nn.hooks import called_differently
from ecanet.nn.tail import eager
from ecanet.nn.tail.functional import run_plan
from ecanet.nn.tail.plan import plan
from ecanet.nn.tail.reading import read_act
from ecanet.ops import reference

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: Modules whose output is new memory that nothing else refers to.
_FRESH = (*_CONVOLUTIONS, nn.Linear, *_BATCH_NORMS, FrozenBatchNorm2d)
#: Modules that write into no existing tensor.
_PURE = (nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Sigmoid, nn.Softmax)
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_ADDITIONS = (operator.add, operator.iadd, torch.add)


class InferenceTail(nn.Module):
    """Gate, residual and activation at the end of a branch; writes over the branch's output if that is safe.

    Args:
        gate: The gate, or None.
        act: Index in :data:`ecanet.ops.reference.ACTS`.
        in_place: Whether the input may be overwritten.
    """

    def __init__(self, gate: nn.Module | None, act: int, in_place: bool) -> None:
        super().__init__()
        self.gate = gate
        self.act = act
        self.in_place = in_place

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(gate(x) + residual)``, the shape of ``x``."""
        if isinstance(x, Tensor) and not x.is_floating_point() and self.gate is None:
            return reference.activate(x if residual is None else x + residual, self.act)
        act = reference.ACTS[self.act]
        tail_plan = plan(x, None, self.gate, residual, act)
        if self.in_place and tail_plan.executor == "kernels" and tail_plan.adds and not tail_plan.calls_gate:
            read = (x, residual, *(() if tail_plan.gate is None else tail_plan.gate.parameters))
            if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in read)):
                return eager.gate_add_act_(tail_plan.backend, x, tail_plan.gate, residual, self.act)
        return run_plan(tail_plan, x, None, self.gate, residual, act)

    def extra_repr(self) -> str:
        """Activation and whether the input is overwritten."""
        return f"act={reference.ACTS[self.act]}, in_place={self.in_place}"


def optimize_for_inference(model: nn.Module) -> fx.GraphModule:
    """Copy a network for inference: the same outputs up to rounding, in less time.

    Every BatchNorm (and torchvision's FrozenBatchNorm2d) that follows a convolution is folded into it. Gate, addition
    and activation at the end of a branch become one :class:`InferenceTail`, which writes over the branch's output. The
    copy is in eval mode, its weights need no gradient, and it can be exported, compiled and traced. Its state dict has
    other keys: load weights before the copy.

    Args:
        model: A network that :func:`torch.fx.symbolic_trace` can trace: those of :mod:`ecanet.models`, torchvision's
            and timm's classifiers. It does not change. As in any trace of torch.fx, ``y += x`` becomes ``y + x`` if y
            is another name of a tensor that is read later. Hooks on layers stay. If you later put a hook on a
            convolution of the copy, the tail may write over the output that the hook saw.

    Raises:
        TypeError: ``model`` is not a module, or is compiled, scripted or wrapped for parallel training.
        ValueError: ``model`` cannot be traced, or it or one of its blocks has a hook, which would be lost.

    Example:
        >>> from ecanet.models import eca_resnet18
        >>> model = eca_resnet18().eval()
        >>> fast = optimize_for_inference(model)
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.allclose(fast(x), model(x), atol=1e-4)
        True
    """
    check_model(model)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    traced = _trace(model)
    _fold_norms(traced)
    _fuse_tails(traced)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Gate, FrozenBatchNorm2d)) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    for name, block in model.named_modules():
        hooks = (block._forward_pre_hooks, block._backward_hooks, block._backward_pre_hooks)
        # The hook that calls an attached gate is traced with the block.
        has_other_hooks = len(block._forward_hooks) > (attached_gate(block) is not None)
        if (has_other_hooks or any(hooks)) and (name == "" or not tracer.is_leaf_module(block, name)):
            raise ValueError(
                f"{f'block {name!r} of ' if name else ''}model {type(model).__name__} has a hook, which the copy would "
                "lose: remove it, and put it on the copy"
            )
    try:
        return fx.GraphModule(model, tracer.trace(model), type(model).__name__)
    except Exception as error:
        raise ValueError(
            f"model {type(model).__name__} cannot be traced ({type(error).__name__}: {error}): optimise the part of it "
            "that can be, such as model.backbone = optimize_for_inference(model.backbone)"
        ) from error


def _called_module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_input(node: fx.Node) -> fx.Node | None:
    """The only argument of a node if that is a tensor, or None."""
    return node.args[0] if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node) else None


def _fold_norms(traced: fx.GraphModule) -> None:
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    attributes = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    for node in list(traced.graph.nodes):
        norm, source = _called_module(traced, node), _only_input(node)
        if not isinstance(norm, (*_BATCH_NORMS, FrozenBatchNorm2d)) or norm.running_mean is None or source is None:
            continue
        layer = _called_module(traced, source)
        if layer is None or type(layer) not in _CONVOLUTIONS:
            continue
        gate = attached_gate(norm)
        if called_differently(norm, known_hooks=int(gate is not None)) or called_differently(layer):
            continue
        # A layer keeps its weights if it is called twice, or if other code reads its output or weights.
        if len(source.users) > 1 or calls[source.target] > 1 or calls[node.target] > 1:
            continue
        if any(name.startswith((f"{source.target}.", f"{node.target}.")) for name in attributes):
            continue
        fold: Any = unwrap(fuse_conv_bn_eval)  # unwrapped: it takes FrozenBatchNorm2d, too, and leaves the gate to us
        traced.set_submodule(str(source.target), fold(layer, norm).requires_grad_(False))
        folded = source
        if gate is not None:
            traced.add_submodule(f"{node.name}_gate", gate)
            with traced.graph.inserting_after(node):
                folded = traced.graph.call_module(f"{node.name}_gate", (source,))
        node.replace_all_uses_with(folded)
        traced.graph.erase_node(node)


def _addends(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that a node adds, or None."""
    function = node.op == "call_function" and node.target in _ADDITIONS
    method = node.op == "call_method" and node.target in ("add", "add_")
    if not (function or method) or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if node.target in (operator.iadd, "add_") and (len(first.users) > 1 or not node.users):
        return None  # other code reads the tensor that the addition writes into
    return first, second


def _act_of(traced: fx.GraphModule, node: fx.Node) -> int | None:
    """Index in ``reference.ACTS`` of the activation that a node applies, or None."""
    module = _called_module(traced, node)
    if module is not None:
        return read_act(module) or None  # an identity is not an activation
    name = _ACT_FUNCTIONS.get(node.target) if node.op == "call_function" else None
    return None if name is None else reference.ACTS.index(name)


def _gate_of(traced: fx.GraphModule, node: fx.Node) -> Gate | None:
    """The gate that a node calls, or None."""
    module = _called_module(traced, node)
    return module if isinstance(module, Gate) and _only_input(node) is not None else None


def _fuse_tails(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        addends = _addends(node)
        if addends is None:
            if _gate_of(traced, node) is None or _is_added(node):
                continue
            branch, residual = node, None
        else:
            branch, residual = _branch_and_residual(traced, *addends)
            if branch is residual:
                continue
        gate, x = _gate_of(traced, branch), _only_input(branch)
        if gate is None or x is None or (branch is not node and not _may_run_later(traced, branch, node)):
            gate, x = None, branch
        end, act = node, 0
        if len(node.users) == 1:
            user = next(iter(node.users))
            code = _act_of(traced, user)
            if code is not None and user is node.next:  # no code in between could write into the addends
                end, act = user, code
        name = f"{end.name}_tail"
        traced.add_submodule(name, InferenceTail(gate, act, in_place=_is_fresh(traced, x)))
        with traced.graph.inserting_after(end):
            tail = traced.graph.call_module(name, (x,) if residual is None else (x, residual))
        end.replace_all_uses_with(tail)
        for old in dict.fromkeys((end, node, branch)):
            if not old.users and old is not x:
                traced.graph.erase_node(old)


def _may_run_later(traced: fx.GraphModule, gate: fx.Node, addition: fx.Node) -> bool:
    """Whether the gate can be called later, at the addition: no code in between writes into its input."""
    if len(gate.users) > 1:
        return False
    between = gate.next
    while between is not addition:
        if between.op not in ("placeholder", "get_attr") and not isinstance(
            _called_module(traced, between), (*_FRESH, *_PURE, Gate, InferenceTail)
        ):
            return False
        between = between.next
    return True


def _is_added(node: fx.Node) -> bool:
    """Whether only an addition reads the node, so that it becomes part of the addition's tail."""
    return len(node.users) == 1 and _addends(next(iter(node.users))) is not None


def _is_fresh(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node's only reader may overwrite its output; with a hook it may not, as the hook may keep it."""
    module = _called_module(traced, node)
    return len(node.users) == 1 and isinstance(module, _FRESH) and not called_differently(module)


def _branch_and_residual(traced: fx.GraphModule, first: fx.Node, second: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Of two addends, the branch is the gated one, or else the one that may be overwritten, or else the first."""

    def preference(addend: fx.Node) -> int:
        if len(addend.users) > 1:
            return 0
        return 2 if _gate_of(traced, addend) is not None else int(_is_fresh(traced, addend))

    return (second, first) if preference(second) > preference(first) else (first, second)
