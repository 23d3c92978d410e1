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

_WRAPPERS = ("module.", "_orig_mod.", "network.")
#: So many wrappers a network has at most.
_WRAPPED = 8
#: Longest key, and most keys, of a state dict.
_KEY_LENGTH, _KEYS = 1000, 20_000
_KEYS_IN_A_MESSAGE = 20
#: What stands after a file's own content: this and the SHA-256 of that content. What reads such files passes it over.
_CHECKSUM = b"\necanet sha256 "


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
        path: A file of ``torch.save`` or safetensors. Where :func:`safe_save` wrote it, its checksum is verified.
        map_location: Device for the tensors, as in ``torch.load``.

    Raises:
        FileNotFoundError: no such file.
        PermissionError: it may not be read.
        ValueError: the file is damaged, compressed so that its size says nothing, or holds code, which
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
    except Exception as error:  # torch and safetensors raise some ten types, depending on where a file is damaged
        raise ValueError(f"{shown(str(path), 200)} {_what_is_wrong(error)}") from error


def _verify_checksum(path: Path) -> None:
    """Raise ValueError where a file's content is not what its checksum says; without one nothing can be said."""
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
        raise ValueError("its content is not what its checksum says")


def safe_save(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a file of ``torch.save``, whole or not at all.

    Behind its content stands a checksum, which :func:`safe_load` verifies and ``torch.load`` passes over.

    Args:
        value: Tensors and plain values.
        path: The file; its folder is made when it is not there.

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
    """The state dict inside what a checkpoint holds; ``source`` names it in errors.

    Raises:
        ValueError: there is none, or a key or a tensor in it is no part of a network's.
    """
    for nested in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nested), Mapping):
            loaded = loaded[nested]
    source = shown(source, 200)
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{source} holds no state dict: expected names mapped to tensors, found {_kind(loaded)}")
    if len(loaded) > _KEYS:
        raise ValueError(f"{source} holds no network's state dict: it has {len(loaded):,} keys, more than {_KEYS:,}")
    looked_at: set[tuple[Any, ...]] = set()
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            where = repr(shown(key)) if isinstance(key, str) else shown(key)
            raise ValueError(
                f"{source} holds no state dict: expected names mapped to tensors, found {_kind(value)} at {where}"
            )
        if len(key) > _KEY_LENGTH:
            raise ValueError(f"{source} holds no network's state dict: a key has {len(key):,} characters, {shown(key)}")
        problem = _problem_of(value, looked_at)
        if problem is not None:
            raise ValueError(f"{source}: {shown(key)} {problem}")
    return _without_prefix(loaded)


def _problem_of(t: Tensor, looked_at: set[tuple[Any, ...]]) -> str | None:
    """Why a tensor is no weight or buffer of a network, or None.

    Args:
        t: The tensor.
        looked_at: Storages whose values were looked at already: many tensors may share one.
    """
    if t.is_meta:
        return "has no values (it is on the device 'meta')"
    if t.layout is not torch.strided or t.is_nested or t.is_quantized:
        return f"is no plain tensor (layout {t.layout}, type {t.dtype})"
    if t.is_complex():
        return f"is complex ({t.dtype})"
    held = t.untyped_storage().nbytes() // t.element_size()
    if t.numel() > held:
        return f"claims {t.numel():,} values of shape {tuple(t.shape)}, and the file holds {held:,}"
    if not t.is_floating_point() or t.numel() == 0:
        return None
    view = (t.untyped_storage().data_ptr(), t.dtype, t.storage_offset(), t.shape, t.stride())
    whole = (t.untyped_storage().data_ptr(), t.dtype)
    if whole in looked_at or view in looked_at:
        return None
    values = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())  # once for all tensors that share it
    values = values if t.element_size() > 1 else values.float()
    if bool(torch.isfinite(values).all()):
        looked_at.add(whole)
        return None
    if not bool(torch.isfinite(t if t.element_size() > 1 else t.float()).all()):
        return "has values that are NaN or infinite: the run that wrote it diverged"
    looked_at.add(view)
    return None


def _kind(value: object) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else type(value).__name__


def _what_is_wrong(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"was refused: it holds {shown(refused[1])}, and reading anything but tensors and plain values can run "
            "code. Save the state dict alone: torch.save(model.state_dict(), path)"
        )
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    if "weights_only" in reason:  # torch's advice is to read the file as code
        reason = "it holds more than tensors and plain values"
    return f"is not a checkpoint that torch or safetensors can read, or it is damaged ({shown(reason, 300)})"


def _without_prefix(state: StateDict) -> dict[str, Tensor]:
    """Keys without what wrappers put before them; versions of modules, which some networks ask for, stay beside."""
    keys, versions = list(state), _versions(state)
    for _ in range(_WRAPPED):
        prefix = next((p for p in _WRAPPERS if all(key.startswith(p) for key in keys)), None)
        if prefix is None:
            break
        keys = [key.removeprefix(prefix) for key in keys]
        versions = {f"{name}.".removeprefix(prefix)[:-1]: value for name, value in versions.items() if name}
    plain: Any = OrderedDict(zip(keys, state.values(), strict=True))
    if versions:
        plain._metadata = versions
    return plain


def _versions(state: StateDict) -> dict[str, dict[str, int]]:
    """Version numbers of modules as ``state_dict()`` keeps them beside the keys; nothing else of what stands there."""
    beside = getattr(state, "_metadata", None)
    named = beside.items() if isinstance(beside, Mapping) else ()
    return {
        name: {"version": about["version"]}
        for name, about in named
        if isinstance(name, str) and isinstance(about, Mapping) and type(about.get("version")) is int
    }


def misfits(state: StateDict, own: StateDict) -> dict[str, list[str]]:
    """Keys of a state dict that a network lacks, or has in another shape or kind."""
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
    """Lists of keys by what is wrong with them, as one sentence; empty if nothing is."""
    return "; ".join(
        f"{len(keys)} {kind}: {listed(keys, _KEYS_IN_A_MESSAGE)}" for kind, keys in problems.items() if keys
    )
