"""How much memory a network takes: what a forward pass keeps for the backward pass, and the most that a call holds."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile


def bytes_kept(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the module's tensors; each storage counts once."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}

    def record(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(record, lambda t: t):
        out = forward()  # its graph keeps every storage, so no address is reused
        assert out.requires_grad
    return sum(sizes.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call holds at a time, without what was allocated before it.

    On a GPU this is what torch's allocator hands out. On a CPU torch's profiler records every allocation and release of
    torch's allocator, and the peak is their largest running sum. Memory that a library allocates in another way is not
    counted.

    Args:
        run: The call. Run it once before, or what only the first call allocates, such as the state of an optimizer, is
            counted as well.
        device: Where it allocates.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _stderr_dropped(), profile(profile_memory=True) as profiler:
        run()
    records = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _stderr_dropped() -> Iterator[None]:
    """Drop what is written to standard error: torch's profiler writes there when it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as dropped:
            os.dup2(dropped.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
