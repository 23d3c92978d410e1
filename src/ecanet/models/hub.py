"""``save_pretrained`` / ``from_pretrained`` through huggingface_hub's mixin, with a clear error if it is missing."""

import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from ecanet.files.state_dicts import describe, misfits, read_state_dict
from ecanet.models.arguments import CHECKS, check_arguments
from ecanet.models.neutral import make_neutral_
from ecanet.nn import Gate
from ecanet.nn.folding import fold_factors_
from ecanet.untrusted import check_file, shown

_NEEDS_PACKAGES = "needs huggingface_hub and safetensors: pip install 'ecanet[hub]'"

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        """Stands in if huggingface_hub is not installed."""

        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()

        def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
            """Say what is missing."""
            raise ImportError(f"save_pretrained {_NEEDS_PACKAGES}")

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
            """Say what is missing."""
            raise ImportError(f"from_pretrained {_NEEDS_PACKAGES}")

        def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
            """Say what is missing."""
            raise ImportError(f"push_to_hub {_NEEDS_PACKAGES}")


class HubModel(
    PyTorchModelHubMixin,
    nn.Module,
    library_name="ecanet",
    paper_url="https://arxiv.org/abs/1910.03151",
    tags=["image-classification", "channel-attention", "eca-net"],
):
    """A network that can be saved to a folder: its arguments as config.json, its weights as model.safetensors.

    A subclass sets ``config`` to the arguments that rebuild it, ``backbone`` to torchvision's name of the network
    without gates, and ``classifier_name`` to the prefix of its classifier's keys. It lists its gates in
    :meth:`gated_norms`.
    """

    config: dict[str, Any]
    backbone: str
    classifier_name: str

    def gated_norms(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Pairs of a norm and the gate that scales its output, in forward order."""
        raise NotImplementedError

    def _start_gates(self) -> None:
        """Initialise the gates as ``config`` says.

        Raises:
            ValueError: a gate cannot be neutral, its factor cannot be folded, or ``factor`` is not the one that
                neutral gates need.
        """
        given = self.config["factor"]
        if self.config["neutral"]:
            make_neutral_(self, fold=self.config["fold"])
        elif self.config["fold"]:
            fold_factors_(self)
        self._record_factor()
        needed = self.config["factor"]
        if self.config["neutral"] and given is not None and given != needed:
            raise ValueError(f"factor must be {needed} or left out with neutral=True, got {given!r}")

    def _record_factor(self, **changes: Any) -> None:
        """Record the gates' common factor in ``config`` (None if they differ), together with other changes.

        Because neutral gates have a known factor, this also shows whether factors were folded later.
        """
        gates = [gate for _, gate in self.gated_norms() if isinstance(gate, Gate)]
        factors = {gate.factor for gate in gates}
        config = {**self.config, **changes, "factor": factors.pop() if len(factors) == 1 else None}
        factor = config["factor"]
        if factor is not None and config["neutral"]:
            needed = 1 / gates[0].neutral_value
            config |= {"fold": factor == 1 and needed != 1, "neutral": factor in (1, needed)}
        elif factor not in (None, 1):
            config["fold"] = False
        self.config = config

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, config: dict[str, Any] | None = None, **kwargs: Any
    ) -> str | None:
        """Write config.json, model.safetensors and a model card into a folder.

        Args:
            save_directory: The folder; created if needed.
            config: What to write to config.json instead of the network's own ``config``.
            kwargs: Passed on to huggingface_hub's ``PyTorchModelHubMixin.save_pretrained``.

        Returns:
            The commit's URL with ``push_to_hub=True``, otherwise None.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            ValueError: the network was built from something that JSON cannot hold, such as a custom gate, or it was
                changed after construction, so that the folder could not be loaded.

        Example:
            >>> import tempfile
            >>> from ecanet.models import ECAResNet
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = ECAResNet(18, "se", num_classes=10).save_pretrained(folder)
            ...     model = ECAResNet.from_pretrained(folder)
            >>> model.config["gate"]
            'se'
        """
        _require_safetensors("save_pretrained")
        self._record_factor()
        config = self.config if config is None else config
        for name, value in config.items():
            try:
                json.dumps(value)
            except TypeError:
                raise ValueError(
                    f"save_pretrained cannot write {name}={value!r} to config.json: only gates known by name and plain "
                    "values can be saved. Save the weights with torch.save(model.state_dict(), path) instead"
                ) from None
        self._check_config_rebuilds(config)
        return super().save_pretrained(save_directory, config=config, **kwargs)

    def _check_config_rebuilds(self, config: dict[str, Any]) -> None:
        with torch.device("meta"):
            rebuilt = type(self)(**config)
        own, built = self.state_dict(), rebuilt.state_dict()
        changed = [key for key in {**own, **built} if key not in own or key not in built]
        changed += [key for key in own if key in built and own[key].shape != built[key].shape]
        if not changed and _gate_reprs(self) != _gate_reprs(rebuilt):
            changed = ["the arguments of its gates"]
        if changed:
            raise ValueError(
                f"save_pretrained cannot describe this network in config.json: {config} builds one that differs in "
                f"{', '.join(changed)}. Build it with the right arguments (num_classes=, gate=) instead of changing "
                "it, or save the weights with torch.save(model.state_dict(), path)"
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *, strict: bool = True, map_location: Any = "cpu", **arguments: Any
    ) -> Any:
        """Build the network that a folder, or a repository of the Hub, describes, and load its weights.

        Both files are treated as data: every argument is checked, none of them opens a path, and no memory is allocated
        for sizes that the weights do not have.

        Args:
            folder: A folder with ``config.json`` and ``model.safetensors``, or the name of a repository of the Hub.
            strict: Reject missing or unexpected weights; otherwise load the weights that fit.
            map_location: Device for the network.
            arguments: huggingface_hub's ``revision``, ``cache_dir``, ``force_download``, ``local_files_only`` and
                ``token``; others override those in ``config.json``.

        Returns:
            The network in eval mode.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            OSError: no such folder, file or repository.
            TypeError, ValueError: a file is damaged, an argument is not the network's, or the weights do not fit; names
                the file.
        """
        _require_safetensors("from_pretrained")
        hub = {name: arguments.pop(name) for name in _DOWNLOAD_ARGUMENTS if name in arguments}
        config_file = _file_of(folder, "config.json", hub)
        given = check_arguments(_read_config(config_file), config_file, _arguments_of(cls)) | arguments
        weights = _file_of(folder, "model.safetensors", hub)
        state = read_state_dict(weights)
        with torch.device("meta"):  # allocates no memory for sizes that the file only claims
            own = cls(**given).state_dict()
        problem = misfits(state, own)
        if not strict:
            problem.pop("unexpected")
        missing = [key for key in own if key not in state] if strict else []
        if misfit := describe(missing=missing, **problem):
            raise ValueError(f"{weights} does not fit the network that {config_file} describes: {misfit}")
        model = cls(**given)
        model.load_state_dict(state, strict=strict)
        return model.to(map_location).eval()


#: Arguments of huggingface_hub's download of a file.
_DOWNLOAD_ARGUMENTS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
#: Largest ``config.json`` in bytes; those written here have less than 1 kB.
_LARGEST_CONFIG = 2**16


def _arguments_of(cls: type) -> list[str]:
    """Arguments of a network's constructor, and of the base constructors that its keyword arguments reach."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base) or not issubclass(base, nn.Module) or base is nn.Module:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.name in CHECKS and p.name not in names]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _file_of(folder: str | Path, name: str, hub: dict[str, Any]) -> Path:
    if Path(folder).is_dir():
        path = Path(folder) / name
        if not path.exists():
            raise FileNotFoundError(f"no {name} in {folder}, so it is not a folder that save_pretrained wrote")
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(f"from_pretrained {_NEEDS_PACKAGES}") from error
    return Path(hf_hub_download(str(folder), name, **hub))


def _read_config(path: Path) -> Any:
    check_file(path, _LARGEST_CONFIG)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file, or it is damaged ({shown(str(error), 200)})") from error


def _gate_reprs(model: HubModel) -> list[str]:
    return [repr(gate) for _, gate in model.gated_norms()]


def _require_safetensors(action: str) -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError(f"{action} {_NEEDS_PACKAGES}")
