"""How much memory a network takes: what a forward pass keeps for its backward, and the most that a call holds."""

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
    """Bytes that a forward pass keeps for the backward, without the module's tensors; every storage once."""
    held = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}

    def see(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(see, lambda t: t):
        out = forward()  # its graph keeps every storage, so no address comes twice
        assert out.requires_grad
    return sum(found.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call holds at a time, beside what was there before it.

    On a GPU it is what torch's allocator hands out. On a CPU torch's profiler records every allocation and release of
    its allocator; the peak is the largest sum of them. Memory that a library takes elsewhere is not seen.

    Args:
        run: The call. Run it once before: what only a first call allocates, such as the state of an optimizer, counts.
        device: Where it allocates.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _without_what_libraries_print(), profile(profile_memory=True) as profiler:
        run()
    records = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _without_what_libraries_print() -> Iterator[None]:
    """Drop what is written to standard error: torch's profiler tells there when it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as dropped:
            os.dup2(dropped.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
