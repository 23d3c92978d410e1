"""Give the blocks of torchvision's and timm's networks the fused tail."""

import importlib
from typing import NamedTuple

from torch import nn

from ecanet.networks.checks import check_model
from ecanet.nn.attached import attached_gate
from ecanet.nn.norms import qualified_name
from ecanet.nn.undo import all_or_nothing
from ecanet.surgery.find.layers import out_channels, resolve
from ecanet.surgery.report import Report, Row
from ecanet.surgery.timm_attention import as_gate


class FusedBlock(NamedTuple):
    """How a block of another library runs on the fused tail.

    Attributes:
        fused: The class that runs on it, with the same modules.
        norm: Path of the branch's last norm.
        attention: Name of the block's own attention between that norm and the addition, if the class has any.
    """

    fused: str
    norm: str
    attention: str | None = None


#: Known blocks, by class name.
FUSED: dict[str, FusedBlock] = {
    "torchvision.models.resnet.BasicBlock": FusedBlock("ecanet.models.resnet.GatedBasicBlock", "bn2", "eca"),
    "torchvision.models.resnet.Bottleneck": FusedBlock("ecanet.models.resnet.GatedBottleneck", "bn3", "eca"),
    "torchvision.models.mobilenetv2.InvertedResidual": FusedBlock(
        "ecanet.models.mobilenetv2.GatedInvertedResidual", "conv.-1"
    ),
    **{
        f"torchvision.models.{block}": FusedBlock(f"ecanet.surgery.fused_torchvision.{fused}", norm)
        for block, fused, norm in (
            ("regnet.ResBottleneckBlock", "FusedResBottleneckBlock", "f.-1.-1"),
            ("mobilenetv3.InvertedResidual", "FusedInvertedResidual", "block.-1.-1"),
            ("efficientnet.MBConv", "FusedMBConvTail", "block.-1.-1"),
            ("efficientnet.FusedMBConv", "FusedMBConvV2Tail", "block.-1.-1"),
        )
    },
    **{
        f"timm.models.{block}": FusedBlock(f"ecanet.surgery.fused_timm.{fused}", norm, attention)
        for block, fused, norm, attention in (
            ("resnet.BasicBlock", "FusedBasicBlock", "bn2", "se"),
            ("resnet.Bottleneck", "FusedBottleneck", "bn3", "se"),
            ("regnet.Bottleneck", "FusedRegNetBottleneck", "conv3.bn", None),
            ("_efficientnet_blocks.DepthwiseSeparableConv", "FusedDepthwiseSeparableConv", "bn2", None),
            ("_efficientnet_blocks.InvertedResidual", "FusedInvertedResidual", "bn3", None),
            ("_efficientnet_blocks.EdgeResidual", "FusedEdgeResidual", "bn2", None),
        )
    },
}


def fuse_tails_(model: nn.Module) -> Report:
    """Let blocks run norm, gate, addition and activation in as few passes over the map as without the gate.

    It works on torchvision's and timm's blocks in :data:`ecanet.surgery.FUSED`: with gates that
    :func:`ecanet.insert_gates_` put in, with timm's own ECA and squeeze-and-excitation (``ecaresnet*``,
    ``seresnet*``), and without attention. A block's class becomes one derived from it. The block keeps its modules,
    parameters, buffers and keys: checkpoints load as before, an optimizer keeps working, and values and gradients are
    the same up to rounding. A second call does nothing. Call it before or after gates are put in.

    Args:
        model: The network.

    Returns:
        The blocks and the norm and gate at the end of each; ``replaced`` holds timm's attention modules that a gate
        with the same parameters replaced.

    Raises:
        TypeError: ``model`` is not a module, or is compiled, scripted or wrapped for parallel training.
        ValueError: it has none of these blocks.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18()
        >>> keys = list(model.state_dict())
        >>> report = fuse_tails_(model)
        >>> len(report.rows), list(model.state_dict()) == keys
        (8, True)
    """
    check_model(model)
    fused_already = tuple({known.fused for known in FUSED.values()})
    rows: list[Row] = []
    notes: list[str] = []
    replaced: dict[str, nn.Module] = {}
    already = 0
    with all_or_nothing(model):
        for name, block in list(model.named_modules()):
            cls = qualified_name(type(block))
            already += cls in fused_already
            known = FUSED.get(cls)
            if known is None:
                continue
            if "forward" in vars(block):
                notes.append(f"left out: {name} has a forward of its own")
            else:
                rows.append(_fuse_(name, block, known, replaced))
    if not rows and not already:
        names = ", ".join(block.removeprefix("torchvision.models.").replace(".models", "") for block in FUSED)
        raise ValueError(f"{type(model).__name__} has no block with a fused tail (known: {names})")
    if already:
        notes.append(f"{already} blocks run on the fused tail already")
    return Report("fused", tuple(rows), tuple(notes), replaced)


def _fuse_(name: str, block: nn.Module, known: FusedBlock, replaced: dict[str, nn.Module]) -> Row:
    """Give one block its fused class; its own attention goes into ``replaced`` if a gate replaces it."""
    norm_name, norm = resolve(block, known.norm)
    gate = attached_gate(norm)
    if known.attention is not None:
        own = getattr(block, known.attention, None)
        gate = own if gate is None and own is not None else gate
        if own is not None and (adopted := as_gate(own, out_channels(norm))) is not own:
            replaced[f"{name}.{known.attention}"] = own
            block.register_module(known.attention, adopted)
            gate = adopted
        elif not hasattr(block, known.attention):
            block.register_module(known.attention, None)
    module_name, _, class_name = known.fused.rpartition(".")
    block.__class__ = getattr(importlib.import_module(module_name), class_name)
    where = f"{name}.{norm_name}" if name else norm_name
    return Row(name, "" if gate is None else type(gate).__name__, where, out_channels(norm))
