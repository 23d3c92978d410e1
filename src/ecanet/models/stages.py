"""The ``kernel_size=`` argument of the networks: one kernel size per stage."""

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from ecanet.nn.kernel_size import check_kernel_size

KernelSize: TypeAlias = int | Literal["adaptive"]
KernelSizes: TypeAlias = int | Literal["adaptive", "released"] | Sequence[int]

#: Kernel sizes of the weights that the authors released. They differ from Eq. (12), which the author calls a guide.
#: The stages of MobileNetV2 are its seven groups of inverted residuals.
RELEASED: dict[str, tuple[int, ...]] = {
    "resnet18": (3, 5, 7, 7),
    "resnet34": (3, 3, 5, 7),
    "resnet50": (3, 5, 5, 7),
    "resnet101": (3, 3, 5, 7),
    "resnet152": (3, 3, 5, 7),
    "mobilenet_v2": (1, 1, 1, 1, 3, 3, 3),
}


def kernel_sizes_per_stage(kernel_size: KernelSizes, stages: int, backbone: str) -> Sequence[KernelSize]:
    """Turn a ``kernel_size=`` argument into one kernel size per stage.

    Args:
        kernel_size: ``"adaptive"`` (Eq. 12, from the block's output channels), ``"released"`` (as in the released
            weights), one odd integer for all, or one odd integer per stage.
        stages: Number of stages of the network.
        backbone: A key of :data:`RELEASED`, or the name of a network without released weights.

    Raises:
        TypeError: a kernel size is not an integer.
        ValueError: unknown name, even or non-positive kernel size, or a wrong number of them.

    Example:
        >>> kernel_sizes_per_stage("released", 4, "resnet50")
        [3, 5, 5, 7]
    """
    if isinstance(kernel_size, str) and kernel_size == "adaptive":
        return ["adaptive"] * stages
    if isinstance(kernel_size, str) and kernel_size == "released":
        if backbone not in RELEASED:
            raise ValueError(
                f"kernel_size='released' needs a network with released weights ({', '.join(RELEASED)}), "
                f"not {backbone}: use 'adaptive' or integers"
            )
        return list(RELEASED[backbone])
    if isinstance(kernel_size, str):
        raise ValueError(
            f"kernel_size must be 'adaptive', 'released', an odd integer or one per stage, got {kernel_size!r}"
        )
    sizes = list(kernel_size) if isinstance(kernel_size, Iterable) else [kernel_size] * stages
    if len(sizes) != stages:
        raise ValueError(f"kernel_size must have one entry for each of the {stages} stages, got {len(sizes)}: {sizes}")
    for size in sizes:
        check_kernel_size(size)
    return sizes
