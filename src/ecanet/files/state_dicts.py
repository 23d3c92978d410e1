"""Checkpoint files: read without running their code, written whole or not at all; how a state dict fits a network."""

import hashlib
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

from ecanet.files.atomic import write_whole
from ecanet.files.pickles import check_pickles
from ecanet.untrusted import check_file, listed, shown

StateDict: TypeAlias = Mapping[str, Tensor]

_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "network.")
#: Most wrappers around one network.
_MAX_WRAPPERS = 8
#: Longest key, and largest number of keys, of a state dict.
_LONGEST_KEY, _MAX_KEYS = 1000, 20_000
_KEYS_IN_A_MESSAGE = 20
#: A file's content is followed by this and the content's SHA-256. Readers of such files ignore it.
_CHECKSUM = b"\necanet sha256 "


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a ``.pth``, ``.pth.tar``, ``.ckpt`` or ``.safetensors`` file, without unpickling code.

    A nested ``state_dict`` or ``model`` is unpacked. Prefixes that wrappers put before every key are removed:
    ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``network.`` (:mod:`ecanet.train`).

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
    """Read the tensors and plain values in a checkpoint file, without unpickling code.

    Args:
        path: A file of ``torch.save`` or safetensors. If :func:`safe_save` wrote it, its checksum is verified.
        map_location: Device for the tensors, as in ``torch.load``.

    Raises:
        FileNotFoundError: no such file.
        PermissionError: it may not be read.
        ValueError: the file is damaged, compressed (it could unpack to any size), or holds code, which
            ``weights_only=True`` refuses; names the file.
        ImportError: a ``.safetensors`` file without safetensors installed.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"no checkpoint at {shown(str(path), 200)}")
    check_file(path)
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path} needs safetensors: pip install 'ecanet[hub]'") from error
        read: Callable[[Path], Any] = load_file
    else:
        read = partial(torch.load, map_location=map_location, weights_only=True)
    try:
        _verify_checksum(path)
        if path.suffix != ".safetensors":
            check_pickles(path)
        return read(path)
    except PermissionError:
        raise
    except Exception as error:  # torch and safetensors raise about ten types, depending on where a file is damaged
        raise ValueError(f"{shown(str(path), 200)} {_what_is_wrong(error)}") from error


def _verify_checksum(path: Path) -> None:
    """Raise ValueError if a file has a checksum that does not match its content."""
    trailer = len(_CHECKSUM) + 64
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - trailer))
        end = file.read(trailer)
        if not end.startswith(_CHECKSUM):
            return
        file.seek(0)
        digest, left = hashlib.sha256(), size - trailer
        while left > 0 and (chunk := file.read(min(left, 2**20))):
            digest.update(chunk)
            left -= len(chunk)
    if digest.hexdigest().encode() != end[len(_CHECKSUM) :]:
        raise ValueError("its content does not match its checksum")


def safe_save(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a file of ``torch.save``, whole or not at all.

    A checksum follows the content: :func:`safe_load` verifies it and ``torch.load`` ignores it.

    Args:
        value: Tensors and plain values.
        path: The file; its folder is created if needed.

    Raises:
        OSError: it could not be written; names the file and its size.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.write(_CHECKSUM + hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    try:
        write_whole(path, buffer.getbuffer())
    except OSError as error:
        size = f"{buffer.tell() / 2**20:.1f} MiB needed"
        raise OSError(error.errno, f"cannot write the checkpoint {path} ({error.strerror}; {size})") from error


def state_dict_in(loaded: object, source: str) -> dict[str, Tensor]:
    """The state dict inside a loaded checkpoint; ``source`` names the checkpoint in errors.

    Raises:
        ValueError: there is none, or a key or a tensor in it cannot belong to a network.
    """
    for nested in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nested), Mapping):
            loaded = loaded[nested]
    source = shown(source, 200)
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{source} holds no state dict: expected names mapped to tensors, found {_type_name(loaded)}")
    if len(loaded) > _MAX_KEYS:
        raise ValueError(
            f"{source} holds no network's state dict: it has {len(loaded):,} keys, more than {_MAX_KEYS:,}"
        )
    checked: set[tuple[Any, ...]] = set()
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            where = repr(shown(key)) if isinstance(key, str) else shown(key)
            raise ValueError(
                f"{source} holds no state dict: expected names mapped to tensors, found {_type_name(value)} at {where}"
            )
        if len(key) > _LONGEST_KEY:
            raise ValueError(f"{source} holds no network's state dict: a key has {len(key):,} characters, {shown(key)}")
        problem = _why_not_a_weight(value, checked)
        if problem is not None:
            raise ValueError(f"{source}: {shown(key)} {problem}")
    return _without_wrapper_prefixes(loaded)


def _why_not_a_weight(t: Tensor, checked: set[tuple[Any, ...]]) -> str | None:
    """Why a tensor cannot be a weight or buffer of a network; None if it can.

    Args:
        t: The tensor.
        checked: Storages and views whose values are known to be finite: many tensors may share a storage.
    """
    if t.is_meta:
        return "has no values (it is on the device 'meta')"
    if t.layout is not torch.strided or t.is_nested or t.is_quantized:
        return f"is not a plain tensor (layout {t.layout}, type {t.dtype})"
    if t.is_complex():
        return f"is complex ({t.dtype})"
    held = t.untyped_storage().nbytes() // t.element_size()
    if t.numel() > held:
        return f"claims {t.numel():,} values of shape {tuple(t.shape)}, and the file holds {held:,}"
    if not t.is_floating_point() or t.numel() == 0:
        return None
    view = (t.untyped_storage().data_ptr(), t.dtype, t.storage_offset(), t.shape, t.stride())
    whole = (t.untyped_storage().data_ptr(), t.dtype)
    if whole in checked or view in checked:
        return None
    values = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())  # one check for all tensors that share it
    values = values if t.element_size() > 1 else values.float()
    if bool(torch.isfinite(values).all()):
        checked.add(whole)
        return None
    if not bool(torch.isfinite(t if t.element_size() > 1 else t.float()).all()):
        return "has values that are NaN or infinite: the run that wrote it diverged"
    checked.add(view)
    return None


def _type_name(value: object) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else type(value).__name__


def _what_is_wrong(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"was refused: it holds {shown(refused[1])}, and reading anything but tensors and plain values can run "
            "code. Save the state dict alone: torch.save(model.state_dict(), path)"
        )
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    if "weights_only" in reason:  # torch would advise running the file's code
        reason = "it holds more than tensors and plain values"
    return f"is not a checkpoint that torch or safetensors can read, or it is damaged ({shown(reason, 300)})"


def _without_wrapper_prefixes(state: StateDict) -> dict[str, Tensor]:
    """A state dict without wrappers' key prefixes; it keeps the modules' version numbers, which some networks read."""
    keys, versions = list(state), _versions(state)
    for _ in range(_MAX_WRAPPERS):
        prefix = next((p for p in _WRAPPER_PREFIXES if all(key.startswith(p) for key in keys)), None)
        if prefix is None:
            break
        keys = [key.removeprefix(prefix) for key in keys]
        versions = {f"{name}.".removeprefix(prefix)[:-1]: value for name, value in versions.items() if name}
    plain: Any = OrderedDict(zip(keys, state.values(), strict=True))
    if versions:
        plain._metadata = versions
    return plain


def _versions(state: StateDict) -> dict[str, dict[str, int]]:
    """The modules' version numbers from the metadata that ``state_dict()`` attaches; all other metadata is dropped."""
    metadata = getattr(state, "_metadata", None)
    named = metadata.items() if isinstance(metadata, Mapping) else ()
    return {
        name: {"version": about["version"]}
        for name, about in named
        if isinstance(name, str) and isinstance(about, Mapping) and type(about.get("version")) is int
    }


def misfits(state: StateDict, own: StateDict) -> dict[str, list[str]]:
    """Keys of a state dict that a network lacks, or has in another shape or kind of type (floating point or not)."""
    both = [(key, value, own[key]) for key, value in state.items() if key in own]
    return {
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(value.shape)} instead of {tuple(mine.shape)}"
            for key, value, mine in both
            if value.shape != mine.shape
        ],
        "of another kind": [
            f"{key} {value.dtype} instead of {mine.dtype}"
            for key, value, mine in both
            if value.is_floating_point() != mine.is_floating_point()
        ],
    }


def describe(**problems: list[str]) -> str:
    """One sentence from lists of keys, named by what is wrong with them; empty if all lists are."""
    return "; ".join(
        f"{len(keys)} {kind}: {listed(keys, _KEYS_IN_A_MESSAGE)}" for kind, keys in problems.items() if keys
    )
