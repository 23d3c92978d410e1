"""What is measured on, and how every process compiles."""

import torch

from benchmarks.cases import On
from ecanet.ops import gpu

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def on_of(dtype: str) -> On:
    """The GPU, or the CPU in the interpreter.

    Args:
        dtype: A key of :data:`DTYPES`.
    """
    return On("cpu" if gpu.interpreting() else "cuda", DTYPES[dtype], "triton")


def configure() -> None:
    """Let every process compile alike: found in the cache is what another has compiled, not which form it found best.

    Others were running beside it then.
    """
    import torch._inductor.config

    torch._inductor.config.autotune_local_cache = False
