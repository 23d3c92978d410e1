"""A network of torchvision or timm with gates: built from plain values, saved with them, and loaded again."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from ecanet.files.state_dicts import describe, misfits, read_state_dict, safe_load, safe_save, state_dict_in
from ecanet.models.arguments import check_arguments
from ecanet.nn.build import check_gate_name
from ecanet.surgery.fuse import fuse_tails_
from ecanet.surgery.insert import insert_gates_
from ecanet.surgery.networks import create_network, default_input_shape
from ecanet.surgery.report import Report
from ecanet.untrusted import check_number, shown

#: The key under which a file says how its network is built.
INSERTION = "ecanet_insertion"


@dataclass(frozen=True)
class Insertion:
    """A network and the gates that go into it.

    Attributes:
        model: ``"torchvision/NAME"`` or ``"timm/NAME"``.
        gate: A name in :data:`ecanet.nn.GATES`.
        where: As in :func:`ecanet.insert_gates_`: a kind, or names and patterns of modules.
        kernel_size: For gates that have one; ``"adaptive"`` is Eq. (12).
        preserve: Start with gates that are 1, so that the network computes the same function.
        fold: Fold the gates' factors into the norms before them, so that the keys are those of the authors' files.
        num_classes: Classes of its head, by default the library's number.
        input_size: Height and width in pixels that multiply-adds are counted for; by default the network's own.
        fuse: Run its blocks on the fused tail, too.
    """

    model: str
    gate: str = "eca"
    where: str | tuple[str, ...] = "block"
    kernel_size: int | Literal["adaptive"] = "adaptive"
    preserve: bool = True
    fold: bool = False
    num_classes: int | None = None
    input_size: int | None = None
    fuse: bool = False

    def build(self, weights: str | os.PathLike[str] | None = None) -> tuple[nn.Module, tuple[Report, ...]]:
        """The network, in eval mode, and what was done to it.

        Args:
            weights: A checkpoint of the network without gates, loaded before they are put in. It has to fit.

        Raises:
            ImportError: a network of timm without timm installed.
            OSError: there is no checkpoint there.
            ValueError: no such network, the checkpoint does not fit, or what :func:`ecanet.insert_gates_` raises.

        Example:
            >>> model, (report,) = Insertion("torchvision/resnet18", where="stage").build()
            >>> len(report.rows)
            4
        """
        check_gate_name(self.gate)
        if self.input_size is not None and self.input_size < 1:
            raise ValueError(f"input_size must be 1 or more, got {self.input_size}")
        state = None if weights is None else read_state_dict(weights)
        model = create_network(self.model, self.num_classes).eval()
        if state is not None:
            _load_strictly(model, state, f"{weights} does not fit {self.model}", "num_classes sets the head's classes")
        shape = default_input_shape(self.model, model)
        if self.input_size is not None:
            shape = (*shape[:2], self.input_size, self.input_size)
        report = insert_gates_(
            model,
            self.gate,
            self.where,
            kernel_size=self.kernel_size,
            preserve=self.preserve,
            fold=self.fold,
            input_shape=shape,
        )
        return model, (report, fuse_tails_(model)) if self.fuse else (report,)


def save(model: nn.Module, insertion: Insertion, path: str | os.PathLike[str]) -> None:
    """Write the weights of a network with gates and the plain values that build it again.

    The file is written under another name and then renamed. :func:`ecanet.models.read_state_dict` reads the weights
    alone.

    Args:
        model: The network that ``insertion`` built, trained since or not.
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
        ValueError: the file is damaged, is not such a file, or the installed libraries build another network from it.

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
        insertion = Insertion(**_checked(loaded[INSERTION]))
        misfit = _misfit(insertion, state)
        if not misfit:
            with torch.random.fork_rng(devices=[]):
                model, _ = insertion.build()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the network in {path} (written with {written}) cannot be built: {error}") from error
    what = f"the weights in {path} do not fit the network it names, {insertion.model}"
    hint = f"it was written with {written}"
    if misfit:
        raise ValueError(f"{what} ({hint}): {misfit}")
    _load_strictly(model, state, what, hint)
    return model


#: Limits: characters in a network's or place's name, and number of places.
_MAX_NAME, _MAX_PLACES = 300, 1000


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an insertion from a file, each checked: none can name a file, class or function.

    Raises:
        TypeError, ValueError: a field is not known, or a value is not allowed.
    """
    if "model" not in values:
        raise ValueError("an insertion needs its model")
    own = ("gate", "kernel_size")
    check_arguments({name: values[name] for name in own if name in values}, "ecanet_insertion", own)
    for name, value in values.items():
        if name not in Insertion.__dataclass_fields__:
            raise ValueError(f"an insertion has no {shown(name)}")
        if name == "model" and not (isinstance(value, str) and len(value) <= _MAX_NAME):
            raise TypeError(f"model must be a name, got {shown(value)}")
        if name in ("preserve", "fold", "fuse") and not isinstance(value, bool):
            raise TypeError(f"{name} must be true or false, got {shown(value)}")
        if name in ("num_classes", "input_size") and value is not None:
            check_number(value, name, 1, 1_000_000 if name == "num_classes" else 4096)
            if not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {shown(value)}")
        if name == "where":
            places = [value] if isinstance(value, str) else value
            if not isinstance(places, (list, tuple)) or not 1 <= len(places) <= _MAX_PLACES:
                raise ValueError(f"where must be a name or a list of at most {_MAX_PLACES}, got {shown(value)}")
            if not all(isinstance(place, str) and len(place) <= _MAX_NAME for place in places):
                raise TypeError(f"where must be names of at most {_MAX_NAME} characters")
    return {**values, "where": tuple(places) if isinstance(places := values.get("where", "block"), list) else places}


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
