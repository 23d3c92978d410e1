"""A network of torchvision or timm with gates: built from plain values, saved with them, and loaded again."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torchvision
from torch import Tensor, nn

from ecanet.files.state_dicts import describe, misfits, safe_load, safe_save, state_dict_in
from ecanet.models.arguments import check_arguments
from ecanet.nn.attached import GATE
from ecanet.nn.build import check_gate_name
from ecanet.surgery.fuse import fuse_tails_
from ecanet.surgery.insert import insert_gates_
from ecanet.surgery.networks import check_network_name, create_network, default_input_shape, trained_weights
from ecanet.surgery.report import Report
from ecanet.untrusted import listed, shown

#: The key under which a file describes how its network is built.
INSERTION = "ecanet_insertion"
#: From a number of classes (None for the library's own) to a network without gates.
Create: TypeAlias = Callable[[int | None], nn.Module]


@dataclass(frozen=True)
class Insertion:
    """A network and the gates that go into it.

    Attributes:
        model: ``"torchvision/NAME"`` or ``"timm/NAME"``.
        gate: A name in :data:`ecanet.nn.GATES`; None for none.
        where: As in :func:`ecanet.insert_gates_`: a kind, or names and patterns of modules.
        kernel_size: For gates that have one; ``"adaptive"`` is Eq. (12).
        preserve: Start with gates that are 1, so that the network computes the same function.
        fold: Fold the gates' factors into the norms before them, so that the keys are those of the authors' files.
        num_classes: Classes of its head, by default the library's number.
        input_size: Height and width in pixels that multiply-adds are counted for; by default the network's own.
        fuse: Run its blocks on the fused tail, too.
    """

    model: str
    gate: str | None = "eca"
    where: str | tuple[str, ...] = "block"
    kernel_size: int | Literal["adaptive"] = "adaptive"
    preserve: bool = True
    fold: bool = False
    num_classes: int | None = None
    input_size: int | None = None
    fuse: bool = False

    def build(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        new_head: bool = False,
        create: Create | None = None,
    ) -> tuple[nn.Module, tuple[Report, ...]]:
        """The network, in eval mode, and what was done to it.

        Args:
            weights: Weights to start from: a file, or the library's own name for them, such as ``"DEFAULT"``. They
                belong to the network without gates, or with these gates.
            new_head: Leave out weights of a head for another number of classes. Otherwise all weights have to fit.
            create: Called with the number of classes, returns the network without gates, in place of the one that
                ``model`` names.

        Raises:
            ImportError: a network of timm without timm installed.
            OSError: there is no such checkpoint, or the library cannot download its weights.
            ValueError: no such network, the weights do not fit, or what :func:`ecanet.insert_gates_` raises.

        Example:
            >>> model, (report,) = Insertion("torchvision/resnet18", where="stage").build()
            >>> len(report.rows)
            4
        """
        if self.gate is not None:
            check_gate_name(self.gate)
        if self.input_size is not None and self.input_size < 1:
            raise ValueError(f"input_size must be 1 or more, got {self.input_size}")
        create = create or partial(create_network, self.model)
        state: Mapping[str, Tensor] | None = None if weights is None else trained_weights(self.model, weights)
        model = create(self.num_classes).eval()
        if state is not None and new_head:
            state = _with_own_head(state, model, create, self.num_classes)
        has_gates = state is not None and any(f".{GATE}." in key for key in state.keys() - model.state_dict().keys())
        what, hint = f"{shown(str(weights), 200)} does not fit {self.model}", "num_classes sets the head's classes"
        if state is not None and not has_gates:
            _load_strictly(model, state, what, hint)
        reports = [] if self.gate is None else [self._insert_(model, self.gate)]
        if state is not None and has_gates:
            _load_strictly(model, state, what, hint)
        if self.fuse:
            reports.append(fuse_tails_(model))
        return model, tuple(reports)

    def _insert_(self, model: nn.Module, gate: str) -> Report:
        shape = default_input_shape(self.model, model)
        if self.input_size is not None:
            shape = (*shape[:2], self.input_size, self.input_size)
        return insert_gates_(
            model,
            gate,
            self.where,
            kernel_size=self.kernel_size,
            preserve=self.preserve,
            fold=self.fold,
            input_shape=shape,
        )


def save(model: nn.Module, insertion: Insertion, path: str | os.PathLike[str]) -> None:
    """Write the weights of a network with gates and the plain values that build it again.

    The file is written under another name and then renamed. :func:`ecanet.models.read_state_dict` reads the weights
    alone.

    Args:
        model: The network that ``insertion`` built, whether trained since or not.
        insertion: How it was built.
        path: The file, of ``torch.save``.

    Raises:
        OSError: it cannot be written.
        ValueError: ``path`` ends in ``.safetensors``.
    """
    check_path(path)
    packages = ("ecanet", "torch", "torchvision", *(["timm"] if insertion.model.startswith("timm/") else []))
    about = dataclasses.asdict(insertion)
    versions = {package: _version(package) for package in packages}
    safe_save({INSERTION: about, "versions": versions, "state_dict": model.state_dict()}, path)


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Build the network with gates that :func:`save` or ``ecanet insert --save`` wrote, without unpickling code.

    Args:
        path: The file.

    Returns:
        The network on the CPU, in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a network of timm without timm installed.
        ValueError: the file is damaged or is of another kind, or the installed libraries build another network from it.

    Example:
        >>> import tempfile
        >>> insertion = Insertion("torchvision/resnet18", num_classes=10)
        >>> model, _ = insertion.build()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, insertion, f"{folder}/model.pt")
        ...     again = load(f"{folder}/model.pt")
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.equal(model(x), again(x))
        True
    """
    insertion, state, written = read(path)
    return rebuild(insertion, state, path, f"written with {written}")


def read(path: str | os.PathLike[str]) -> tuple[Insertion, dict[str, Tensor], str]:
    """What :func:`save` wrote: how the network is built, its weights, and the versions that wrote it, as a text.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or is of another kind.
    """
    loaded = safe_load(path)
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get(INSERTION), Mapping):
        raise ValueError(
            f"{path} is a checkpoint, but not one that `ecanet insert --save` wrote, so nothing says how to build its "
            "network: build it, then model.load_state_dict(ecanet.models.read_state_dict(path))"
        )
    versions = loaded.get("versions")
    pairs = list(versions.items())[:10] if isinstance(versions, Mapping) else []
    written = (
        "unknown versions" if not pairs else ", ".join(f"{shown(package)} {shown(number)}" for package, number in pairs)
    )
    state = state_dict_in(loaded.get("state_dict"), str(path))
    try:
        return Insertion(**_checked(loaded[INSERTION])), state, written
    except (TypeError, ValueError) as error:
        raise ValueError(f"the network in {path} (written with {written}) cannot be built: {error}") from error


def rebuild(
    insertion: Insertion,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    hint: str,
    create: Create | None = None,
) -> nn.Module:
    """A network as an insertion builds it, in eval mode, with all of these weights. No random number is drawn.

    Args:
        insertion: How it is built. A network of a library takes no memory for sizes that the weights do not have.
        state: The weights, gates included.
        path: The file that both are from, for errors.
        hint: What errors add in brackets.
        create: As in :meth:`Insertion.build`.

    Raises:
        ValueError: the weights do not fit, or as in :meth:`Insertion.build`.
    """
    what = f"the weights in {path} do not fit the network it names, {insertion.model}"
    try:
        misfit = _misfit(insertion, state) if create is None else ""
        if not misfit:
            with torch.random.fork_rng(devices=[]):
                model, _ = insertion.build(create=create)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the network in {path} ({hint}) cannot be built: {error}") from error
    if misfit:
        raise ValueError(f"{what} ({hint}): {misfit}")
    _load_strictly(model, state, what, hint)
    return model


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an insertion from a file, each checked: none can name a file, class or function.

    Raises:
        TypeError, ValueError: a field is not known, or a value is not allowed.
    """
    if unknown := [name for name in values if name not in Insertion.__dataclass_fields__]:
        raise ValueError(f"an insertion has no {listed(map(str, unknown), 5)}")
    model = values.get("model")
    if not isinstance(model, str):
        raise TypeError(f"model must be the name of a network, got {shown(model)}")
    check_network_name(model)
    chosen = {name: value for name, value in values.items() if name != "model"}
    if chosen.get("num_classes") is None:
        chosen.pop("num_classes", None)
    check_arguments(chosen, INSERTION, tuple(chosen))
    return {**values, "where": tuple(places) if isinstance(places := values.get("where", "block"), list) else places}


def _with_own_head(
    state: Mapping[str, Tensor], model: nn.Module, create: Create, num_classes: int | None
) -> Mapping[str, Tensor]:
    """The weights, with the network's own head if theirs has another shape: that follows from the number of classes."""
    own = model.state_dict()
    if all(key in state and state[key].shape == value.shape for key, value in own.items()):
        return state
    with torch.random.fork_rng(devices=[]):
        other = _on_meta(create, (num_classes or 0) + 1)
    head = {key for key, value in own.items() if key not in other or other[key].shape != value.shape}
    if all(key in state and state[key].shape == own[key].shape for key in head):
        return state
    return {**{key: value for key, value in state.items() if key not in head}, **{key: own[key] for key in head}}


def _on_meta(create: Create, num_classes: int | None) -> dict[str, Tensor]:
    """A network's weights and buffers without their values, or with them if it cannot be built without."""
    try:
        with torch.device("meta"):
            return create(num_classes).state_dict()
    except Exception:  # torchvision's RegNets, and others whose code reads the values that it creates
        return create(num_classes).state_dict()


def _misfit(insertion: Insertion, state: Mapping[str, Tensor]) -> str:
    """Describe how the weights differ from the network without gates, without allocating it; empty if they fit."""
    try:
        with torch.device("meta"):
            own = create_network(insertion.model, insertion.num_classes).state_dict()
    except NotImplementedError:  # torchvision's RegNets cannot be built without values, and some are large
        known = torchvision.models.get_model_weights(insertion.model.partition("/")[2])["DEFAULT"].meta["num_params"]
        held = sum(t.numel() for t in state.values())
        return f"it has {known:,} parameters, and the file {held:,} values" if held < known / 2 else ""
    fits = {key: value for key, value in state.items() if key in own}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    return describe(missing=missing, **misfits(fits, own))


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a network with gates cannot be saved under that name."""
    path = Path(path)
    if path.suffix == ".safetensors":
        raise ValueError(f"cannot save to {path}: the file is one of torch.save, so name it {path.with_suffix('.pt')}")
    if path.is_dir():
        raise ValueError(f"cannot save to {path}: it is a folder; name a file such as {path / 'model.pt'}")


def _load_strictly(model: nn.Module, state: Mapping[str, Any], what: str, hint: str) -> None:
    own = model.state_dict()
    # Checkpoints from before torch 0.4.1 have no count of batches, and torch accepts that.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    problem = describe(missing=missing, **misfits(state, own))
    try:
        if not problem:
            model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{what} ({hint}): {problem}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
