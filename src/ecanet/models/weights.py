"""Weights made elsewhere: the authors' released checkpoints, and plain networks' weights without gates."""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from ecanet.models.kernel_sizes import RELEASED
from ecanet.models.neutral import make_neutral_

if TYPE_CHECKING:
    from ecanet.models.mobilenetv2 import ECAMobileNetV2
    from ecanet.models.resnet import ECAResNet, SmallECAResNet

StateDict = Mapping[str, Tensor]
PlainWeights: TypeAlias = str | os.PathLike[str] | WeightsEnum | StateDict
GatedNetwork = TypeVar("GatedNetwork", bound="ECAResNet | SmallECAResNet | ECAMobileNetV2")

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
    return _state_dict_in(safe_load(path), str(path))


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


def _state_dict_in(loaded: object, source: str) -> dict[str, Tensor]:
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
    keys = list(state)
    while prefix := next((p for p in _WRAPPERS if keys and all(key.startswith(p) for key in keys)), None):
        keys = [key.removeprefix(prefix) for key in keys]
    return dict(zip(keys, state.values(), strict=True))


def load_plain_weights(model: GatedNetwork, weights: PlainWeights) -> GatedNetwork:
    """Load a plain network's weights into one with gates, without changing the function the network computes.

    Training starts from the plain network: every gate is made constant (with w = 0 it is sigmoid(0) = 1/2), and the
    norm before it takes the factor back (its weight and bias are doubled), exactly in floating point. A classifier that
    is not of the model's shape is left out and the model's own kept.

    Args:
        model: A network of :mod:`ecanet.models`; changed in place.
        weights: torchvision's weights (an enum, or its name such as ``"IMAGENET1K_V1"``, which torchvision
            downloads), a file, or a state dict with torchvision's keys.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError, ImportError: as :func:`read_state_dict`.
        ValueError: keys are missing, unexpected or of the wrong shape, the state dict has gates of its own, or a
            gate cannot be constant (SE-Var1 has no weights). The model is then unchanged.

    Example:
        >>> import torchvision
        >>> from ecanet.models import eca_resnet18
        >>> plain = torchvision.models.resnet18().eval()
        >>> model = load_plain_weights(eca_resnet18(), plain.state_dict()).eval()
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.allclose(model(x), plain(x), atol=1e-5)
        True
    """
    state = _resolve(weights, model.backbone)
    own = model.state_dict()
    gates = {id(gate) for _, gate in model.gated_norms()}
    gate_keys = {
        f"{name}.{key}" for name, module in model.named_modules() if id(module) in gates for key in module.state_dict()
    }
    if _kernel_sizes(state) or any(key in state for key in gate_keys):
        raise ValueError(
            "weights hold gates of their own, so they are not a plain network's: load them with "
            "model.load_state_dict(weights), or a released checkpoint with ecanet.models.load_official(path)"
        )
    optional = gate_keys
    classifier = model.classifier_name.split(".")[0] + "."
    if _shapes(state, classifier) != _shapes(own, classifier):
        state = {key: value for key, value in state.items() if not key.startswith(classifier)}
        optional |= {key for key in own if key.startswith(classifier)}
    missing = [
        key for key in own if key not in state and key not in optional and not key.endswith("num_batches_tracked")
    ]
    problems = _describe(missing=missing, **_misfits(state, own))
    if problems:
        raise ValueError(f"weights do not fit {model.backbone}: {problems}")
    before = {key: value.clone() for key, value in own.items()}
    model.load_state_dict(state, strict=False)
    try:
        make_neutral_(model)
    except Exception:
        model.load_state_dict(before)
        raise
    return model


def _resolve(weights: PlainWeights, backbone: str) -> dict[str, Tensor]:
    if isinstance(weights, WeightsEnum):
        return _download(weights)
    if isinstance(weights, Mapping):
        return _state_dict_in(weights, "weights")
    if isinstance(weights, str) and not Path(weights).exists() and not Path(weights).suffix:
        try:
            names = [entry.name for entry in get_model_weights(backbone)]
        except ValueError:
            names = []
        if not names or weights not in (*names, "DEFAULT"):
            raise ValueError(
                f"weights={weights!r} is neither a file nor a name of torchvision's weights for {backbone}: "
                f"{', '.join(names) or 'there are none'}"
            )
        return _download(get_model_weights(backbone)[weights])
    return read_state_dict(weights)


def _download(weights: WeightsEnum) -> dict[str, Tensor]:
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except OSError as error:
        raise OSError(
            f"{weights} could not be downloaded from {weights.url} ({error}): without a network, pass a file's path"
        ) from error


def load_official(path: str | os.PathLike[str], strict: bool = True) -> "ECAResNet | ECAMobileNetV2":
    """Load a checkpoint that the authors of ECA-Net released, and build the network it belongs to.

    Reads the released ``.pth.tar`` files as they are: a dict with a nested ``state_dict`` whose keys carry
    DataParallel's ``module.``. Depth, kernel sizes and number of classes follow from the tensors.

    Args:
        path: The checkpoint file.
        strict: Raise when keys are missing or unexpected. Otherwise warn, load the others and leave the missing
            ones as they were initialised.

    Returns:
        An :class:`~ecanet.models.ECAResNet` or :class:`~ecanet.models.ECAMobileNetV2` with those weights, on the CPU,
        in training mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, not one of ECA-Net's networks, or keys that are missing, unexpected or of another
            shape (named, up to 20 of each).

    Source:
        GitHub ``BangguWu/ECANet``.

    Example:
        >>> load_official("eca_resnet50_k3557.pth.tar")  # doctest: +SKIP
    """
    from ecanet.models.mobilenetv2 import ECAMobileNetV2
    from ecanet.models.resnet import ECAResNet

    state = read_state_dict(path)
    kernels = _kernel_sizes(state)
    if not kernels:
        raise ValueError(
            f"{path} holds no ECA weights (no key ends in 'conv.weight' with shape (1, 1, k)): "
            "for a plain network's weights use ecanet.models.load_plain_weights"
        )
    model: ECAResNet | ECAMobileNetV2
    if any(key.startswith("features.") for key in state):
        model = ECAMobileNetV2(
            kernel_size=_mobilenet_stages(kernels, path), num_classes=_classes(state, ECAMobileNetV2.classifier_name)
        )
    else:
        depth = _depth(state, path)
        model = ECAResNet(
            depth,
            kernel_size=_resnet_stages(kernels, depth, path),
            num_classes=_classes(state, ECAResNet.classifier_name),
        )
    own = model.state_dict()
    # Checkpoints from before torch 0.4.1 have no such counters; torch starts them at 0.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    problems = _describe(missing=missing, **_misfits(state, own))
    if problems:
        found = f"{path} looks like {model.backbone}, but {problems}"
        if strict:
            raise ValueError(f"{found}: pass strict=False to load what fits")
        warnings.warn(found, stacklevel=2)
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    model.load_state_dict(fitting, strict=False)
    return model


def _shapes(state: StateDict, prefix: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if key.startswith(prefix)}


def _misfits(state: StateDict, own: StateDict) -> dict[str, list[str]]:
    return {
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in state.items()
            if key in own and value.shape != own[key].shape
        ],
    }


def _describe(**problems: list[str]) -> str:
    def listed(keys: list[str]) -> str:
        shown = ", ".join(keys[:_KEYS_IN_A_MESSAGE])
        return shown if len(keys) <= _KEYS_IN_A_MESSAGE else f"{shown} and {len(keys) - _KEYS_IN_A_MESSAGE} more"

    return "; ".join(f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys)


def _kernel_sizes(state: StateDict) -> dict[str, int]:
    # Kernel size of every ECA weight by the name of the block it is in; no other tensor of these networks is (1, 1, k).
    # The last part of a name is "eca" in the ResNets, the gate's number in the sequence "conv" in MobileNetV2.
    return {
        re.sub(r"\.[^.]+\.conv\.weight$", "", key): value.shape[-1]
        for key, value in state.items()
        if key.endswith(".conv.weight") and value.dim() == 3 and value.shape[:2] == (1, 1)
    }


def _one_per_stage(stages: list[set[int]], backbone: str, path: object) -> list[int]:
    for i, sizes in enumerate(stages, start=1):
        if len(sizes) > 1:
            raise ValueError(
                f"{path} has kernel sizes {sorted(sizes)} within stage {i} of {backbone}: "
                "the networks of the paper, and so of this function, have one kernel size a stage"
            )
    # A stage without gates goes on, so that load_official can name every missing key.
    return [next(iter(sizes), released) for sizes, released in zip(stages, RELEASED[backbone], strict=True)]


def _resnet_stages(kernels: Mapping[str, int], depth: int, path: object) -> list[int]:
    stages = [{size for block, size in kernels.items() if block.startswith(f"layer{i}.")} for i in range(1, 5)]
    return _one_per_stage(stages, f"resnet{depth}", path)


def _mobilenet_stages(kernels: Mapping[str, int], path: object) -> list[int]:
    from ecanet.models.mobilenetv2 import BLOCKS_PER_STAGE

    stages, first = [], 1  # features.0 is the stem
    for blocks in BLOCKS_PER_STAGE:
        names = [f"features.{n}.conv" for n in range(first, first + blocks)]
        stages.append({kernels[name] for name in names if name in kernels})
        first += blocks
    return _one_per_stage(stages, "mobilenet_v2", path)


def _depth(state: StateDict, path: object) -> int:
    blocks = [len({key.split(".")[1] for key in state if key.startswith(f"layer{i}.")}) for i in range(1, 5)]
    kind = "bottleneck" if any(".conv3." in key for key in state) else "basic"
    depths: dict[tuple[str, tuple[int, ...]], int] = {
        ("basic", (2, 2, 2, 2)): 18,
        ("basic", (3, 4, 6, 3)): 34,
        ("bottleneck", (3, 4, 6, 3)): 50,
        ("bottleneck", (3, 4, 23, 3)): 101,
        ("bottleneck", (3, 8, 36, 3)): 152,
    }
    if (kind, tuple(blocks)) not in depths:
        raise ValueError(f"{path} is not an ECA-ResNet-18, 34, 50, 101 or 152: found {kind} blocks {blocks} a stage")
    return depths[kind, tuple(blocks)]


def _classes(state: StateDict, classifier: str) -> int:
    weight = state.get(f"{classifier}.weight")
    return 1000 if weight is None else weight.shape[0]
