"""Makes Ultralytics' YOLO keep gates: those in its model files, and those in a network that it rebuilds for training.

Ultralytics is under the AGPL-3.0. It is imported only when a function is called, and none of its code is here.
"""

import contextlib
import copy
import functools
import importlib.abc
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from ecanet.nn.absent_gates import keep_loading_
from ecanet.nn.attached import attach_, attached_gate, attached_gates
from ecanet.nn.build import GATES, GateFactory
from ecanet.nn.gate import Gate

_WATCHED_MODULE = "ultralytics.engine.model"  # importing it imports ultralytics.nn.tasks first


def patch_when_imported() -> None:
    """Patch Ultralytics in every process that imports both libraries, whichever it imports first.

    A saved network is data, and reading it must not patch a library. But a process that has read one with gates has
    imported :mod:`ecanet.nn`, which calls this, so it can continue training.
    """
    if _WATCHED_MODULE in sys.modules:
        patch_if_possible()
    elif not any(isinstance(finder, _ImportWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatcher())


class _ImportWatcher(importlib.abc.MetaPathFinder):
    """Finds one module where Python would find it, and patches Ultralytics once it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _WATCHED_MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch_if_possible()

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


#: The module that Ultralytics prints for the gates of model files.
_SHOWN_MODULE = "ecanet.integrations.ultralytics"


class _ModelFileRow(nn.Module):
    """The class behind a gate's name in a model file; calling it returns a plain gate.

    Checkpoints hold the whole network, pickled. From ecanet they contain only gates of :mod:`ecanet.nn`, so loading one
    needs ecanet installed but no ``register()``.
    """

    name: ClassVar[str]
    factory: ClassVar[GateFactory]

    def __new__(cls, row: int, channels: list[int], source: int, *args: Any) -> nn.Module:  # type: ignore[misc]
        """Build the gate for the channels of layer ``source``; ``args`` are its arguments after the channels."""
        c = channels[source]
        try:
            if len(args) > 1 or (args and isinstance(args[0], int) and args[0] >= c):
                raise ValueError(f"at most one argument is allowed, and it must be below the {c} channels")
            return cls.factory(c, *args)
        except (TypeError, ValueError) as error:
            written = ", ".join(map(str, args))
            raise ValueError(
                f"row {row} of the model file, {cls.name} with the arguments [{written}]: {error}. Channels are not "
                f"written down: they are the {c} of the layer before. [] means the defaults{_HINTS.get(cls.name, '')}"
            ) from error


_HINTS = {"ECA": ", [3] a kernel size of 3", "ECANS": ", [3] a kernel size of 3", "SE": ", [8] a reduction of 8"}


class _Arguments(list[Any]):
    """Arguments of a gate's row. ``parse_model`` replaces those that name its local variables by their values."""

    def __str__(self) -> str:  # the table that Ultralytics prints
        _, channels, source, *args = self
        return str([channels[source], *args])


def _model_file_rows() -> dict[str, type[_ModelFileRow]]:
    return {
        factory.__name__: type(
            factory.__name__,
            (_ModelFileRow,),
            {"__module__": _SHOWN_MODULE, "name": factory.__name__, "factory": staticmethod(factory)},
        )
        for factory in GATES.values()
    }


def _parse_with_gates(tasks: Any, rows: dict[str, type[_ModelFileRow]]) -> Callable[..., Any]:
    """Wrap Ultralytics' ``parse_model`` for model files with gates, so that it passes them the channels so far.

    ``parse_model`` looks up every string argument among its own variables: ``ch`` is the list of channels of the layers
    so far, ``f`` the number of the row's input layer. A gate's name that the user has redefined is left alone.
    """
    parse_model = tasks.parse_model

    @functools.wraps(parse_model)
    def parse(d: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        d = dict(d)
        row = 0
        for part in ("backbone", "head"):
            rewritten = []
            for source, repeats, module, arguments in d[part]:
                if module in rows and getattr(tasks, module, None) is rows[module]:
                    if not isinstance(source, int):
                        raise ValueError(
                            f"row {row} of the model file, {module}: 'from' must be the number of one layer, got "
                            f"{source}: put a Concat row before it"
                        )
                    arguments = _Arguments([row, "ch", "f", *arguments])
                rewritten.append([source, repeats, module, arguments])
                row += 1
            d[part] = rewritten
        return parse_model(d, *args, **kwargs)

    parse.reads_gates = True  # type: ignore[attr-defined]
    return parse


def patch_if_possible() -> None:
    """Patch Ultralytics as :func:`register` does, but ignore failures: the process may not need gates.

    :func:`patch_when_imported` arranges for this call once Ultralytics is imported.
    """
    with contextlib.suppress(AttributeError, ImportError, ValueError):
        keep_gates()
        read_rows()


def read_rows() -> tuple[str, ...]:
    """Let model files name gates.

    Returns:
        The names.

    Raises:
        ImportError: Ultralytics is not installed, or its way of reading model files has changed.
        ValueError: Ultralytics already has another module of that name.
    """
    try:
        import ultralytics
        from ultralytics.nn import tasks
    except ImportError as error:
        raise _not_installed(error) from error
    rows = _model_file_rows()
    if not getattr(tasks.parse_model, "reads_gates", False):
        for name in rows:
            if getattr(vars(tasks).get(name), "__module__", _SHOWN_MODULE) != _SHOWN_MODULE:
                raise ValueError(
                    f"ultralytics.nn.tasks already has a module {name}, {getattr(tasks, name)!r}: remove it from that "
                    "file, so that the gate of ecanet can have its name"
                )
        parse = _parse_with_gates(tasks, rows)
        try:
            vars(tasks).update(rows)
            _check_parse(parse)
        except Exception as error:
            for name in rows:
                delattr(tasks, name)
            raise ImportError(
                f"Ultralytics {ultralytics.__version__} reads model files in a way that ecanet does not know "
                f"({type(error).__name__}: {error}): pip install 'ultralytics==8.4.190', which it knows"
            ) from error
        tasks.parse_model = ultralytics.nn.parse_model = parse
    return tuple(rows)


def _check_parse(parse: Callable[..., Any]) -> None:
    """Raise unless a gate after a layer of 8 channels is built for 8 channels."""
    file = {"nc": 1, "backbone": [[-1, 1, "nn.Conv2d", [3, 3, 1]], [-1, 1, "Conv", [8]]], "head": [[-1, 1, "ECA", [5]]]}
    with torch.random.fork_rng(devices=[]):  # an import must not draw random numbers
        layers, _ = parse(file, 3, verbose=False)
    gate = layers[-1]
    if type(gate) is not GATES["eca"] or (gate.channels, gate.kernel_size) != (8, 5):
        raise TypeError(f"a row [-1, 1, ECA, [5]] after 8 channels became {gate!r}")


def keep_gates() -> None:
    """Let ``YOLO.train`` keep the gates that :func:`ecanet.insert_gates_` put into ``YOLO(...).model``.

    For training, Ultralytics rebuilds the network from its model file and copies the weights that fit; gates that are
    not in the file would be lost. After this call they are also put into the new network.
    :func:`ecanet.insert_gates_` and :func:`register` call this, and so does importing both libraries, as reading a
    saved network with gates does. Calling it again has no effect.

    Raises:
        ImportError: Ultralytics is not installed.
    """
    try:
        from ultralytics.engine.model import Model
        from ultralytics.nn.tasks import BaseModel
    except ImportError as error:
        raise _not_installed(error) from error
    if not getattr(BaseModel.load, "keeps_gates", False):
        BaseModel.load = _load_with_gates(BaseModel.load)
        Model.train = _train_with_gates(Model.train)


def _not_installed(error: ImportError) -> ImportError:
    return ImportError(f"gates in YOLO need Ultralytics ({error}): pip install 'ecanet[ultralytics]'")


def _load_with_gates(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Ultralytics' ``BaseModel.load``, which copies one network's weights into another, to copy gates too."""

    @functools.wraps(load)
    def load_with_gates(self: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        source = (weights.get("ema") or weights["model"]) if isinstance(weights, dict) else weights
        if not (isinstance(source, nn.Module) and source is not self and _same_file(self, source)):
            return load(self, weights, *args, **kwargs)
        modules = dict(self.named_modules())
        for name, gate in list(source.named_modules()):
            if isinstance(gate, Gate) and isinstance(modules.get(name), Gate) and not _same_gate(gate, modules[name]):
                self.set_submodule(name, copy.deepcopy(gate).float())  # replace_gates_ changed a gate of the file
        for name, host, gate in list(attached_gates(source)):
            if name in modules and attached_gate(modules[name]) is None and _same_shapes(modules[name], host):
                attach_(modules[name], copy.deepcopy(gate).float())
        result = load(self, weights, *args, **kwargs)  # layers of the head may become copies of the source's
        kept = {name for name, _, _ in attached_gates(self)}
        if kept:
            keep_loading_(self)
        missing = [name for name, _, _ in attached_gates(source) if name not in kept]
        if missing:
            warnings.warn(
                f"{len(missing)} gates are left out, because layers of the new network have other shapes: "
                f"{', '.join(missing)}",
                stacklevel=2,
            )
        return result

    load_with_gates.keeps_gates = True  # type: ignore[attr-defined]
    return load_with_gates


def _same_file(first: Any, second: Any) -> bool:
    """Whether two networks come from the same rows at the same scale; the number of classes may differ."""
    rows = [{key: getattr(m, "yaml", {}).get(key) for key in ("backbone", "head", "scale")} for m in (first, second)]
    return rows[0] == rows[1]


def _same_gate(first: nn.Module, second: nn.Module) -> bool:
    return (type(first), first.extra_repr()) == (type(second), second.extra_repr())


def _same_shapes(host: nn.Module, source: nn.Module) -> bool:
    tensors = source.state_dict()
    return all(key in tensors and tensors[key].shape == value.shape for key, value in host.state_dict().items())


def _train_with_gates(train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)
    def train_with_gates(self: Any, trainer: Any = None, **kwargs: Any) -> Any:
        if isinstance(self.model, nn.Module) and any(True for _ in attached_gates(self.model)):
            pretrained = {**self.overrides, **kwargs}.get("pretrained", True)
            if pretrained is not True:
                raise ValueError(
                    f"pretrained={pretrained!r} would lose the gates that insert_gates_ put into this network: leave "
                    "it out to train from its weights, or name the gates in the model file to start from other weights"
                )
            if not self.ckpt:  # built from a model file: train this network, not a new one from the file
                self.ckpt = {"model": self.model}
        return train(self, trainer, **kwargs)

    return train_with_gates
