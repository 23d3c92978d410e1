"""The setup of a measurement on a GPU, and how every process compiles."""

import torch

from benchmarks.cases import Setup
from ecanet.ops import gpu

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def setup_of(dtype: str) -> Setup:
    """The GPU, or the CPU in the interpreter.

    Args:
        dtype: A key of :data:`DTYPES`.
    """
    return Setup("cpu" if gpu.interpreting() else "cuda", DTYPES[dtype], "triton")


def configure() -> None:
    """Make every process compile in the same way: processes share compiled code, but not results of autotuning.

    Those were timed while other processes were running.
    """
    import torch._inductor.config

    torch._inductor.config.autotune_local_cache = False
