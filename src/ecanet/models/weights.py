"""Weights made elsewhere: the authors' released checkpoints, and plain networks' weights without gates."""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from ecanet.models.neutral import make_neutral_

if TYPE_CHECKING:
    from ecanet.models.mobilenetv2 import ECAMobileNetV2
    from ecanet.models.resnet import ECAResNet, SmallECAResNet

StateDict = Mapping[str, Tensor]
PlainWeights: TypeAlias = str | os.PathLike[str] | WeightsEnum | StateDict


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a ``.pth``, ``.pth.tar``, ``.ckpt`` or ``.safetensors`` file, without unpickling code.

    A nested ``state_dict`` or ``model`` is taken out, and the prefix ``module.`` of DataParallel dropped.

    Args:
        path: The file.

    Returns:
        Names to tensors, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no state dict, or something that ``weights_only=True`` refuses.
        ImportError: a ``.safetensors`` file without safetensors installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path} needs safetensors: pip install 'ecanet[hub]'") from error
        loaded: Any = load_file(path)
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is not a checkpoint that can be loaded safely ({str(error).splitlines()[0]}): it is damaged, "
                "or holds more than tensors and plain values; save its state dict alone with torch.save"
            ) from error
    for nested in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nested), Mapping):
            loaded = loaded[nested]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"{path} holds no state dict: expected names mapped to tensors, found {type(loaded).__name__}")
    return _without_prefix(loaded)


def _without_prefix(state: StateDict) -> dict[str, Tensor]:
    prefix = "module."
    if all(key.startswith(prefix) for key in state):
        return {key[len(prefix) :]: value for key, value in state.items()}
    return dict(state)


def load_plain_weights(
    model: "ECAResNet | SmallECAResNet | ECAMobileNetV2", weights: PlainWeights
) -> "ECAResNet | SmallECAResNet | ECAMobileNetV2":
    """Load a plain network's weights into one with gates, without changing the function the network computes.

    Training starts from the plain network: every gate is made constant (with w = 0 it is sigmoid(0) = 1/2), and the
    norm before it takes the factor back (its weight and bias are doubled), exactly in floating point. A classifier of
    another size than the model's is left out and the model's own kept.

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
    classifier = [f"{model.classifier_name}.weight", f"{model.classifier_name}.bias"]
    if any(key in state and state[key].shape != own[key].shape for key in classifier):
        state = {key: value for key, value in state.items() if key not in classifier}
        optional = set(classifier)
    else:
        optional = set()
    gates = {id(gate) for _, gate in model.gated_norms()}
    optional |= {
        f"{name}.{key}" for name, module in model.named_modules() if id(module) in gates for key in module.state_dict()
    }
    if any(key in state for key in optional - set(classifier)):
        raise ValueError(
            "weights hold gates of their own, so they are not a plain network's: "
            "load them with model.load_state_dict, or with ecanet.models.load_official"
        )
    missing = [
        key for key in own if key not in state and key not in optional and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = _describe(missing=missing, unexpected=unexpected, misshapen=misshapen)
    if problems:
        raise ValueError(f"weights do not fit {model.backbone}: {problems}")
    before = {key: value.clone() for key, value in own.items()}
    model.load_state_dict(state, strict=False)
    try:
        make_neutral_(model)
    except ValueError:
        model.load_state_dict(before)
        raise
    return model


def _resolve(weights: PlainWeights, backbone: str) -> dict[str, Tensor]:
    if isinstance(weights, WeightsEnum):
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    if isinstance(weights, Mapping):
        return _without_prefix(weights)
    if isinstance(weights, str) and not Path(weights).exists() and not Path(weights).suffix:
        try:
            names = [entry.name for entry in get_model_weights(backbone)]
        except ValueError:
            names = []
        if weights not in (*names, "DEFAULT"):
            raise ValueError(
                f"weights={weights!r} is neither a file nor a name of torchvision's weights for {backbone}: "
                f"{', '.join(names) or 'there are none'}"
            )
        return dict(get_model_weights(backbone)[weights].get_state_dict(progress=True, check_hash=True))
    return read_state_dict(weights)


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
        ValueError: not a checkpoint, not one of ECA-Net's networks, or missing or unexpected keys (all named).

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
            kernel_size=_mobilenet_stages(kernels, path), num_classes=_classes(state, "classifier.1", path)
        )
    else:
        model = ECAResNet(
            _depth(state, path),
            kernel_size=_resnet_stages(kernels, path),
            num_classes=_classes(state, "fc", path),
        )
    own = model.state_dict()
    # Checkpoints from before torch 0.4.1 have no such counters; torch starts them at 0.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    problems = _describe(missing=missing, unexpected=unexpected)
    if problems:
        found = f"{path} looks like {model.backbone}, but {problems}"
        if strict:
            raise ValueError(f"{found}: pass strict=False to load what fits")
        warnings.warn(found, stacklevel=2)
    model.load_state_dict(state, strict=False)
    return model


def _describe(**problems: list[str]) -> str:
    return "; ".join(f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)


def _kernel_sizes(state: StateDict) -> dict[str, int]:
    # Kernel size of every ECA weight, by the block's name; no other tensor of these networks has this shape.
    return {
        re.sub(r"\.[^.]+\.conv\.weight$", "", key): value.shape[-1]
        for key, value in state.items()
        if key.endswith(".conv.weight") and value.dim() == 3 and value.shape[:2] == (1, 1)
    }


def _one_per_stage(stages: list[list[int]], path: object) -> list[int]:
    for i, sizes in enumerate(stages, start=1):
        if len(set(sizes)) != 1:
            raise ValueError(f"{path} has different kernel sizes within stage {i}: {sizes or 'none at all'}")
    return [sizes[0] for sizes in stages]


def _resnet_stages(kernels: Mapping[str, int], path: object) -> list[int]:
    return _one_per_stage(
        [[size for block, size in kernels.items() if block.startswith(f"layer{i}.")] for i in range(1, 5)], path
    )


def _mobilenet_stages(kernels: Mapping[str, int], path: object) -> list[int]:
    from ecanet.models.mobilenetv2 import BLOCKS_PER_STAGE

    stages, first = [], 1  # features.0 is the stem
    for blocks in BLOCKS_PER_STAGE:
        names = {f"features.{n}.conv" for n in range(first, first + blocks)}
        names |= {f"features.{n}" for n in range(first, first + blocks)}
        stages.append([size for block, size in kernels.items() if block in names])
        first += blocks
    return _one_per_stage(stages, path)


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


def _classes(state: StateDict, classifier: str, path: object) -> int:
    weight = state.get(f"{classifier}.weight")
    if weight is None:
        raise ValueError(f"{path} lacks the classifier's {classifier}.weight")
    return weight.shape[0]
