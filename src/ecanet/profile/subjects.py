"""Networks to profile, from names and files, each also without its gates."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecanet.models import MODELS, HubModel, build_model, load_official
from ecanet.nn.build import check_gate_name
from ecanet.profile.paper import TABLE3, PaperRow, paper_row
from ecanet.profile.yolo import build_yolo, is_yolo
from ecanet.surgery.find.layers import attention_in, is_attention
from ecanet.surgery.insert import insert_gates_
from ecanet.surgery.insertion_file import load
from ecanet.surgery.networks import create_network, default_input_shape, is_of_a_library
from ecanet.surgery.remove import remove_gates_

#: The word for a network without gates.
NO_GATE = "none"
#: Picture size of the small ResNet, in pixels.
_SMALL = 28
_KINDS = (
    f"a network of ecanet ({', '.join(MODELS)}), torchvision/NAME, timm/NAME, a model file of Ultralytics (.yaml), "
    "a file of ecanet insert --save (.pt), a checkpoint (.ckpt, .pth, .pth.tar) or a run's folder"
)


@dataclass(frozen=True)
class Subject:
    """A network to profile.

    Attributes:
        name: Name of its row.
        build: Builds it, on the CPU or under ``torch.device("meta")``.
        plain: Builds it without its gates.
        base: Subjects with the same base are the same network without gates.
        image_size: Height and width of its pictures, in pixels.
        paper: Its row in the paper's Table 3, or None.
        values_matter: Whether its weights come from a file, so that it cannot be built on the meta device.
    """

    name: str
    build: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    base: str
    image_size: int
    paper: PaperRow | None = None
    values_matter: bool = False


def subjects(models: Sequence[str | os.PathLike[str]], gates: Sequence[str] = ()) -> list[Subject]:
    """The subjects for every network with every gate; networks of libraries are built once, to check them.

    Args:
        models: Names and files.
        gates: Names in :data:`ecanet.nn.GATES`, ``timm:NAME``, and ``none``. If empty, each network keeps the gates
            that its name implies.

    Raises:
        ImportError: a network needs timm or Ultralytics, which is not installed.
        FileNotFoundError: there is no such file.
        ValueError: there are no models, a name is unknown, a gate is given for a file, or a network appears twice.
    """
    if not models:
        raise ValueError(f"models must name at least one network, got none: {_KINDS}")
    for gate in gates:
        if gate != NO_GATE:
            check_gate_name(gate, f", {NO_GATE!r}")
    chosen: Sequence[str | None] = gates or [None]
    all_subjects = [_subject(os.fspath(model), gate) for model in models for gate in chosen]
    names = [subject.name for subject in all_subjects]
    if repeated := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"models and gates must differ, got {repeated} twice")
    return all_subjects


def subjects_of_table3() -> list[list[Subject]]:
    """The rows of the paper's Table 3 that can be built, a list for each backbone."""
    rows = [row for row in TABLE3 if row.measured]
    return [
        [
            Subject(row.name, _table3_builder(row), partial(build_model, name, gate=None), name, 224, row)
            for row in rows
            if row.network == name
        ]
        for name in dict.fromkeys(row.network for row in rows)
    ]


def without_gates(network: nn.Module) -> nn.Module:
    """A copy of a network without channel attention, be it this library's or another's."""
    if isinstance(network, HubModel):
        absent: dict[str, Any] = {"kernel_size": "adaptive", "neutral": False, "factor": None, "fold": False}
        return type(network)(**{**network.config, **absent, "gate": None})
    plain = copy.deepcopy(network)
    remove_gates_(plain, force=True)
    for parent in [module for module in plain.modules() if not is_attention(module)]:
        for name, child in list(parent.named_children()):
            if is_attention(child):
                parent.add_module(name, _identity_like(child))
    return plain


def attention_modules(network: nn.Module) -> list[nn.Module]:
    """The channel attention modules of a network, or the network itself if it is one, without those inside another."""
    return [module for _, module in attention_in(nn.ModuleList([network]))]


def _identity_like(module: nn.Module) -> nn.Module:
    """An identity with the attributes that Ultralytics sets on each layer of a model file."""
    identity = nn.Identity()
    for name in ("i", "f", "type", "np"):
        if name in vars(module):
            setattr(identity, name, vars(module)[name])
    return identity.train(module.training)


def _table3_builder(row: PaperRow) -> Callable[[], nn.Module]:
    if row.gate == "gc":
        return partial(_with_global_context, row.network)
    kernel_size = {"kernel_size": "released"} if row.gate == "eca" else {}
    return partial(build_model, row.network, gate=row.gate, **kernel_size)


def _with_global_context(network: str) -> nn.Module:
    """A network with timm's GlobalContext as in the paper of GCNet: the context is added to the map, ratio 1/16.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        from timm.layers import GlobalContext
    except ImportError as error:
        raise ImportError("the row of GCNet needs timm: pip install 'ecanet[timm]'") from error
    gate = partial(GlobalContext, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16)
    return build_model(network, gate=gate)


def _subject(model: str, gate: str | None) -> Subject:
    name = model if gate is None else f"{model} + {gate}"
    if model in MODELS:
        return _own(model, gate, name)
    if is_of_a_library(model) and not os.path.lexists(model):
        return _of_library(model, gate, name)
    if is_yolo(model):
        return _yolo(model, gate, name)
    if not os.path.lexists(model):
        raise ValueError(f"models must be {_KINDS}; got {model!r}, which is neither such a name nor an existing file")
    if gate is not None:
        raise ValueError(f"gate={gate!r} cannot go into {model}: a saved network has the gates it was saved with")
    return _saved(model)


def _own(model: str, gate: str | None, name: str) -> Subject:
    chosen: dict[str, Any] = {} if gate is None else {"gate": None if gate == NO_GATE else gate}
    inserted = "eca" if gate is None else chosen["gate"]
    size = _SMALL if model == "small_eca_resnet" else 224
    build = partial(build_model, model, **chosen)
    return Subject(name, build, partial(build_model, model, gate=None), model, size, paper_row(model, inserted))


def _of_library(model: str, gate: str | None, name: str) -> Subject:
    bare = partial(create_network, model)
    inserted = None if gate == NO_GATE else gate
    build = bare if inserted is None else partial(_build_with_gates, bare, inserted, "block")
    # Build it now, so that an unknown name or a gate that finds no place is reported before anything is measured.
    try:
        size = default_input_shape(model, _without_values(build))[-1]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Subject(name, build, lambda: without_gates(bare()), model, size, paper_row(model, inserted))


def _without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on the meta device, or with values if that is not possible, as for torchvision's RegNets."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:
        return build()


def _build_with_gates(build: Callable[[], nn.Module], gate: str, where: str) -> nn.Module:
    network = build()
    insert_gates_(network, gate, where, preserve=False)
    return network


def _yolo(model: str, gate: str | None, name: str) -> Subject:
    network = build_yolo(model)  # now, so that mistakes in the file are reported before anything is measured
    bare = partial(copy.deepcopy, network)
    build = bare if gate in (None, NO_GATE) else partial(_build_with_gates, bare, str(gate), "conv")
    return Subject(name, build, partial(without_gates, network), model, 640, None, values_matter=True)


def _saved(model: str) -> Subject:
    network, size = _read(Path(model))
    # Deep copies, as measuring trains a network for a few steps.
    build = partial(copy.deepcopy, network)
    return Subject(model, build, partial(without_gates, network), model, size, None, values_matter=True)


def _read(path: Path) -> tuple[nn.Module, int]:
    """Read the network in a file or folder; return it with the size of its pictures."""
    if path.is_dir() and (path / "config.json").exists():
        return _read_pretrained(path), 224
    if path.is_dir() or path.suffix == ".ckpt":
        from ecanet.train.checkpoint import load_trained

        trained = load_trained(path)
        return trained.network, int(trained.recipe["data"]["image_size"] or 224)
    if path.suffix in (".pth", ".tar", ".safetensors"):
        return load_official(path), 224
    return load(path), 224


def _read_pretrained(folder: Path) -> nn.Module:
    """Read a network that ``save_pretrained`` wrote."""
    from ecanet.models import ECAMobileNetV2, ECAResNet, SmallECAResNet

    problems = []
    for kind in (ECAResNet, ECAMobileNetV2, SmallECAResNet):
        try:
            return kind.from_pretrained(folder)
        except (TypeError, ValueError) as error:
            problems.append(f"{kind.__name__}: {error}")
    raise ValueError(f"{folder} holds no network of ecanet: {'; '.join(problems)}")
