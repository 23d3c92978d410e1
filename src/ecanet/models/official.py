"""Loads the checkpoints that the authors of ECA-Net released."""

import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch

from ecanet.files.state_dicts import StateDict, describe, misfits, read_state_dict
from ecanet.models.eca_keys import eca_kernel_sizes
from ecanet.models.mobilenetv2 import BLOCKS_PER_STAGE, ECAMobileNetV2
from ecanet.models.resnet import ECAResNet
from ecanet.models.stages import RELEASED


def load_official(path: str | os.PathLike[str], strict: bool = True) -> ECAResNet | ECAMobileNetV2:
    """Load a checkpoint that the authors of ECA-Net released, and build the network it belongs to.

    Reads the released ``.pth.tar`` files as they are: a dict with a nested ``state_dict`` whose keys carry
    DataParallel's ``module.``. Depth, kernel sizes and number of classes follow from the tensors.

    Args:
        path: The checkpoint file.
        strict: Raise if keys are missing or unexpected. Otherwise warn, load the others, and leave missing ones as
            they were initialised.

    Returns:
        An :class:`~ecanet.models.ECAResNet` or :class:`~ecanet.models.ECAMobileNetV2` with those weights, on the CPU,
        in training mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint or not one of ECA-Net's networks, or keys are missing, unexpected or of
            another shape (up to 20 of each are named).

    Source:
        GitHub ``BangguWu/ECANet``.

    Example:
        >>> load_official("eca_resnet50_k3557.pth.tar")  # doctest: +SKIP
    """
    state = read_state_dict(path)
    kernels = eca_kernel_sizes(state)
    if not kernels:
        raise ValueError(
            f"{path} holds no ECA weights (no key ends in 'conv.weight' with shape (1, 1, k)): "
            "for a plain network's weights use ecanet.models.load_plain_weights"
        )
    build: Callable[[], ECAResNet | ECAMobileNetV2]
    if any(key.startswith("features.") for key in state):
        build = partial(
            ECAMobileNetV2,
            kernel_size=_mobilenet_kernel_sizes(kernels, path),
            num_classes=_number_of_classes(state, ECAMobileNetV2.classifier_name, 1280),
        )
    else:
        depth = _depth(state, path)
        build = partial(
            ECAResNet,
            depth,
            kernel_size=_resnet_kernel_sizes(kernels, depth, path),
            num_classes=_number_of_classes(state, ECAResNet.classifier_name, 512 if depth < 50 else 2048),
        )
    with torch.device("meta"):  # allocates no memory for sizes that the file only claims
        model = build()
    own = model.state_dict()
    # Checkpoints from before torch 0.4.1 lack these counters; torch starts them at 0.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    problems = describe(missing=missing, **misfits(state, own))
    if problems:
        message = f"{path} looks like {model.backbone}, but {problems}"
        if strict:
            raise ValueError(f"{message}: pass strict=False to load what fits")
        warnings.warn(message, stacklevel=2)
    model = build()
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    model.load_state_dict(fitting, strict=False)
    return model


def _one_per_stage(stages: list[set[int]], backbone: str, path: object) -> list[int]:
    for i, sizes in enumerate(stages, start=1):
        if len(sizes) > 1:
            raise ValueError(
                f"{path} has kernel sizes {sorted(sizes)} within stage {i} of {backbone}: "
                "the paper's networks, which this function builds, have one kernel size per stage"
            )
    # A stage without gates is not an error here, so that load_official can name every missing key.
    return [next(iter(sizes), released) for sizes, released in zip(stages, RELEASED[backbone], strict=True)]


def _resnet_kernel_sizes(kernels: Mapping[str, int], depth: int, path: object) -> list[int]:
    stages = [{size for block, size in kernels.items() if block.startswith(f"layer{i}.")} for i in range(1, 5)]
    return _one_per_stage(stages, f"resnet{depth}", path)


def _mobilenet_kernel_sizes(kernels: Mapping[str, int], path: object) -> list[int]:
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
        raise ValueError(f"{path} is not an ECA-ResNet-18, 34, 50, 101 or 152: found {kind} blocks {blocks} per stage")
    return depths[kind, tuple(blocks)]


def _number_of_classes(state: StateDict, classifier: str, features: int) -> int:
    """Rows of the classifier's weight, for which the file has values; 1000 if the shape is not a classifier's."""
    weight = state.get(f"{classifier}.weight")
    is_one = weight is not None and weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] == features
    return weight.shape[0] if weight is not None and is_one else 1000
