"""Checkpoint files: read without running their code, written whole or not at all; how a state dict fits a network."""

import contextlib
import io
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

StateDict: TypeAlias = Mapping[str, Tensor]

_WRAPPERS = ("module.", "_orig_mod.", "network.")
_KEYS_IN_A_MESSAGE = 20


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a ``.pth``, ``.pth.tar``, ``.ckpt`` or ``.safetensors`` file, without unpickling code.

    A nested ``state_dict`` or ``model`` is taken out, and what wrappers put before every key is dropped: ``module.``
    (DataParallel), ``_orig_mod.`` (torch.compile), ``network.`` (:mod:`ecanet.train`).

    Args:
        path: The file.

    Returns:
        Names to tensors, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds no state dict, or holds code, which ``weights_only=True`` refuses.
        ImportError: a ``.safetensors`` file without safetensors installed.
    """
    return state_dict_in(safe_load(path), str(path))


def safe_load(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Read whatever tensors and plain values a checkpoint file holds, without unpickling code.

    Args:
        path: A file of ``torch.save`` or safetensors.
        map_location: Device for the tensors, as in ``torch.load``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds code, which ``weights_only=True`` refuses; names the file.
        ImportError: a ``.safetensors`` file without safetensors installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path} needs safetensors: pip install 'ecanet[hub]'") from error
        read: Callable[[Path], Any] = load_file
    else:
        read = partial(torch.load, map_location=map_location, weights_only=True)
    try:
        return read(path)
    except OSError:
        raise
    except Exception as error:  # torch and safetensors raise some ten types, depending on where a file is damaged
        raise ValueError(f"{path} {_what_is_wrong(error)}") from error


def safe_save(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a file of ``torch.save`` beside its place and rename it: a kill or a full disk leaves what was there.

    Args:
        value: Tensors and plain values.
        path: The file; its folder is made when it is not there.

    Raises:
        OSError: it could not be written; names the file and its size.
    """
    target = Path(path)
    partial_file = target.with_name(f".{target.name}.{os.getpid()}.partial")
    buffer = io.BytesIO()
    torch.save(value, buffer)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_file.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_file, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial_file.unlink(missing_ok=True)
        size = f"{buffer.tell() / 2**20:.1f} MiB needed"
        raise OSError(error.errno, f"cannot write the checkpoint {target} ({error.strerror}; {size})") from error


def state_dict_in(loaded: object, source: str) -> dict[str, Tensor]:
    """The state dict inside what a checkpoint holds; ``source`` names it in errors."""
    for nested in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nested), Mapping):
            loaded = loaded[nested]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{source} holds no state dict: expected names mapped to tensors, found {_kind(loaded)}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{source} holds no state dict: expected names mapped to tensors, found {_kind(value)} at {key!r}"
            )
    return _without_prefix(loaded)


def _kind(value: object) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else type(value).__name__


def _what_is_wrong(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"was refused: it holds {refused[1]}, and reading anything but tensors and plain values can run code. "
            "Save the state dict alone: torch.save(model.state_dict(), path)"
        )
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"is not a checkpoint that torch or safetensors can read, or it is damaged ({reason})"


def _without_prefix(state: StateDict) -> dict[str, Tensor]:
    """Keys without what wrappers put before them; versions of modules, which some networks ask for, stay beside."""
    keys, versions = list(state), dict(getattr(state, "_metadata", None) or {})
    while prefix := next((p for p in _WRAPPERS if keys and all(key.startswith(p) for key in keys)), None):
        keys = [key.removeprefix(prefix) for key in keys]
        versions = {f"{name}.".removeprefix(prefix)[:-1]: value for name, value in versions.items() if name}
    plain: Any = OrderedDict(zip(keys, state.values(), strict=True))
    if versions:
        plain._metadata = versions
    return plain


def misfits(state: StateDict, own: StateDict) -> dict[str, list[str]]:
    """Keys of a state dict that a network lacks, or has in another shape."""
    return {
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in state.items()
            if key in own and value.shape != own[key].shape
        ],
    }


def describe(**problems: list[str]) -> str:
    """Lists of keys by what is wrong with them, as one sentence; empty if nothing is."""

    def listed(keys: list[str]) -> str:
        shown = ", ".join(keys[:_KEYS_IN_A_MESSAGE])
        return shown if len(keys) <= _KEYS_IN_A_MESSAGE else f"{shown} and {len(keys) - _KEYS_IN_A_MESSAGE} more"

    return "; ".join(f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys)


def eca_kernel_sizes(state: StateDict) -> dict[str, int]:
    """Kernel size of every ECA weight, by the name of the block it is in."""
    # No other tensor of these networks is (1, 1, k).
    # The last part of a name is "eca" in the ResNets, the gate's number in the sequence "conv" in MobileNetV2.
    return {
        re.sub(r"\.[^.]+\.conv\.weight$", "", key): value.shape[-1]
        for key, value in state.items()
        if key.endswith(".conv.weight") and value.dim() == 3 and value.shape[:2] == (1, 1)
    }
