"""Which implementation of an operation runs: plain PyTorch (the reference), the C++ or the Triton kernels.

:func:`decide` makes the decision: all code that depends on it calls this function, or one of its parts.
"""

import inspect
import logging
import os
import threading
from contextlib import ContextDecorator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ecanet.ops import cpu, gpu
from ecanet.ops.gpu_maps import DTYPES as GPU_DTYPES
from ecanet.private_torch import (
    FakeTensor,
    FunctionalTensor,
    are_transforms_active,
    is_forward_ad_on,
    is_tracing,
    why_no_kernels,
)

NAMES = ("auto", "reference", "cpu", "triton")
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Types of plain tensors: not a shard, a quantised weight or another subclass with operations of its own.
PLAIN_TENSORS = (Tensor, nn.Parameter)
#: What torch.compile gets for the tail on a GPU: the ``operation``, whose kernels Inductor launches, or the
#: ``formula`` in plain PyTorch, which it fuses. Measured: python -m benchmarks.gpu.
FORMS_ON_GPU = {"training": "operation", "inference": "operation"}


def _name_from_environment() -> str:
    name = os.environ.get("ECANET_BACKEND") or "auto"
    if name not in NAMES:
        raise ValueError(f"ECANET_BACKEND must be one of {', '.join(NAMES)}, got {name!r}")
    return name


# A plain global, so that a compiled function recompiles when it changes. torch.compile of torch 2.10 cannot trace a
# ContextVar, and reads a threading.local only once.
_choice = _name_from_environment()
_has_warned = False


class _Token:
    """Stands for one ``with backend(...)`` that was entered and not left yet."""

    def __init__(self, name: str) -> None:
        self.name = name


#: In the order in which they were entered: the last one is in force. Outside of all of them, ``_outside`` is.
_entered: list[_Token] = []
_outside = _choice
_lock = threading.RLock()  # reentrant: a signal handler may take it while the main thread holds it
if hasattr(os, "register_at_fork"):  # no fork while another thread holds it, because the child lacks that thread
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class backend(ContextDecorator):  # noqa: N801
    """Choose the implementation for everything inside ``with``, or inside the decorated function.

    The choice holds for the whole process, other threads and asyncio tasks included, like torch's own flags. If several
    choices are entered, the one that was entered last is in force. They may be left in any order: leaving one removes
    only that one, and after all are left, the choice is what it was before the first. The environment variable
    ``ECANET_BACKEND`` is the initial choice, also in spawned processes; a forked process keeps its parent's choice.

    Args:
        name: ``"auto"``: the C++ kernels on the CPU, the Triton kernels on a GPU, and the reference where these cannot
            run. ``"reference"``: plain PyTorch everywhere. ``"cpu"``: the C++ kernels, or an error that says why they
            cannot run. ``"triton"``: likewise, also on the CPU if ``TRITON_INTERPRET=1`` is in the environment.

    Raises:
        ValueError: unknown name.
        RuntimeError: the implementation cannot run here; the message says why, and what to do.
        TypeError: it decorates a coroutine or a generator, whose body runs after the call has returned.

    Example:
        >>> import torch, ecanet
        >>> gate = ecanet.ECA(64)
        >>> with ecanet.backend("reference"):
        ...     gate(torch.ones(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self._tokens: list[_Token] = []

    def _recreate_cm(self) -> "backend":
        return type(self)(self.name)  # a new one for every call of a decorated function

    def __call__(self, function: Any) -> Any:
        """Decorate a function."""
        kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
        callables = function, inspect.unwrap(function), type(function).__call__
        if any(is_kind(f) for is_kind in kinds for f in callables):
            name = getattr(function, "__name__", type(function).__name__)
            raise TypeError(
                f"ecanet.backend decorates functions, and {name} is a coroutine or a generator, which "
                f"runs later: write `with ecanet.backend({self.name!r}):` inside it"
            )
        return super().__call__(function)

    def __enter__(self) -> None:
        """Make the choice effective."""
        if (reason := reason_against(self.name)) is not None:
            raise RuntimeError(_refusal(self.name, reason))
        token = _Token(self.name)
        if torch.compiler.is_compiling():  # it traces in one thread, and cannot trace locks
            self._tokens.append(token)
            _enter(token)
            return
        try:
            with _lock:
                self._tokens.append(token)
                _enter(token)
        except BaseException:  # from a signal handler: __exit__ will not run
            with _lock:
                _leave(token)
                self._tokens.remove(token)
            raise

    def __exit__(self, *exc: object) -> None:
        """Undo the choice."""
        if torch.compiler.is_compiling():
            _leave(self._tokens.pop())
            return
        with _lock:
            _leave(self._tokens[-1])
            self._tokens.pop()


def _enter(token: _Token) -> None:
    global _choice, _outside
    if not _entered:
        _outside = _choice
    _entered.append(token)
    _choice = token.name


def _leave(token: _Token) -> None:
    global _choice
    if token in _entered:
        _entered.remove(token)
    _choice = _entered[-1].name if _entered else _outside


def current() -> str:
    """The choice in force: ``auto``, ``reference``, ``cpu`` or ``triton``."""
    return _choice


class Decision(NamedTuple):
    """What computes on a feature map now.

    Attributes:
        name: ``"cpu"`` or ``"triton"``: the kernels; ``"reference"``: plain PyTorch; ``"compiler"``: its own code.
        why: The reason, in a few words.
        is_watched: Whether something has to see plain PyTorch: :func:`watched_by`.
    """

    name: str
    why: str
    is_watched: bool = False


_CPP = Decision("cpu", "x is on the CPU")
_TRITON = Decision("triton", "x is on a GPU, or Triton's interpreter was asked for")
#: :func:`is_operation_in_graph` says whether it gets a formula or an operation.
_COMPILER = Decision("compiler", "torch.compile or torch.export traces")
_NOT_A_MAP = Decision("reference", "x is empty or has no shape (N, C, *spatial) with 0 to 3 spatial dimensions")


def decide(x: Tensor) -> Decision:
    """Decide what computes on a feature map now.

    Args:
        x: A map; anything else goes to the reference.

    Raises:
        RuntimeError: the backend asked for by :func:`ecanet.backend` cannot run.
    """
    if is_compiling():
        return decide_in_graph(x)
    if (watcher := watched_by(x)) is not None:
        return Decision("reference", why_no_kernels() or watcher, is_watched=True)
    name = choose(x)
    if name == "reference":
        return Decision(name, _why_reference(x))
    if not 2 <= x.dim() <= 5 or x.numel() == 0:
        return _NOT_A_MAP
    return _CPP if name == "cpu" else _TRITON


def decide_in_graph(x: Tensor) -> Decision:
    """The decision for a feature map in a compiler's graph: the code that the compiler generates.

    Args:
        x: A map.

    Raises:
        RuntimeError: the backend asked for by :func:`ecanet.backend` cannot run.
    """
    if _choice in ("cpu", "triton") and (type(x) in PLAIN_TENSORS or isinstance(x, (FakeTensor, FunctionalTensor))):
        reason = _reason_before_compiling(_choice, x.device.type, x.dtype)
        if reason is not None:
            raise RuntimeError(_refusal(_choice, reason))
    return _COMPILER


@torch.compiler.assume_constant_result
def _reason_before_compiling(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernels of that name cannot run on such a tensor; None if they can, or if something watches the call.

    A compiler calls this while it traces, and does not trace into it, because it inspects the machine.
    """
    if are_transforms_active() or is_forward_ad_on():
        return None
    return cpu_reason(device_type, dtype) if name == "cpu" else triton_reason(device_type, dtype)


def watched_by(x: Tensor) -> str | None:
    """What has to see plain PyTorch operations on x; None for nothing. Compilers are not considered.

    It can be torch.jit.trace, torch.fx, a transform of torch.func, forward-mode differentiation, or x itself if it is
    a tensor with operations of its own.
    """
    if is_tracing():
        return "torch.jit.trace is running"
    if type(x) not in PLAIN_TENSORS:
        return f"x is a {type(x).__name__}, which sees every operation"
    if x.layout is not torch.strided:
        return f"x is not dense but {x.layout}"
    if are_transforms_active():
        return "a transform of torch.func is active"
    return "forward-mode derivatives are taken" if is_forward_ad_on() else None


def is_operation_in_graph(x: Tensor, training: bool) -> bool:
    """Whether a compiler's graph gets the tail of x as one operation, and not as a formula that it fuses.

    On a CPU the C++ kernels take a quarter of the time that Inductor's code for the same formulas takes
    (``python -m benchmarks.cpu --only training``).

    Args:
        x: A map.
        training: Whether the norm takes the statistics of the batch.
    """
    if x.is_cpu:
        return _choice in ("auto", "cpu") and choose(x) == "cpu"
    form = FORMS_ON_GPU["training" if training else "inference"]
    may_run = _choice in ("auto", "triton") and gpu.IS_COMPLETE and x.dtype in GPU_DTYPES
    return x.is_cuda and form == "operation" and may_run


def choose(x: Tensor) -> str:
    """The implementation for maps of this device and type: ``"reference"``, ``"cpu"`` or ``"triton"``.

    Raises:
        RuntimeError: the implementation that :func:`backend` or ``ECANET_BACKEND`` asks for cannot run on ``x``.
    """
    # First and without any other check, because a check takes as long as a small map.
    if _choice in ("auto", "cpu") and x.is_cpu and x.dtype in CPU_DTYPES and cpu.why_not() is None:
        return "cpu"
    if _choice == "reference":
        return "reference"
    device_type = x.device.type
    if _choice == "cpu":
        raise RuntimeError(_refusal("cpu", str(cpu_reason(device_type, x.dtype))))
    if _choice == "triton" or device_type == "cuda":
        reason = triton_reason(device_type, x.dtype)
        if reason is None:
            return "triton"
        if _choice == "triton":
            raise RuntimeError(_refusal("triton", reason))
    if not _has_warned and device_type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        _warn_once(device_type)
    return "reference"


def _why_reference(x: Tensor) -> str:
    """Why :func:`choose` takes the reference for x."""
    if _choice == "reference":
        return "backend('reference') or ECANET_BACKEND asks for it"
    device_type = x.device.type
    reason = triton_reason(device_type, x.dtype) if device_type == "cuda" else cpu_reason(device_type, x.dtype)
    return str(reason)


def reason_against(name: str) -> str | None:
    """Why the named choice cannot run on this machine; None if it can, at least on some tensors."""
    if name == "cpu":
        return cpu.why_not()
    if name == "triton":
        return gpu.why_not()
    return None


def cpu_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot run on such a tensor; None if they can."""
    if (reason := cpu.why_not()) is not None:
        return reason
    if device_type != "cpu":
        return f"the C++ kernels take tensors on the CPU, this one is on {device_type}"
    if dtype not in CPU_DTYPES:
        return f"the C++ kernels take float32, float64, bfloat16 and float16, this tensor is {dtype}"
    return None


def triton_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on such a tensor; None if they can."""
    if (reason := gpu.why_not()) is not None:
        return reason
    if device_type != "cuda" and not (device_type == "cpu" and gpu.interpreting()):
        return f"the Triton kernels take tensors on a GPU, this one is on {device_type}"
    if dtype not in GPU_DTYPES:
        return f"the Triton kernels take float32, float64, bfloat16 and float16, this tensor is {dtype}"
    return None


def _refusal(name: str, reason: str) -> str:
    return f"backend {name!r} cannot run: {reason}"


def _warn_once(device_type: str) -> None:
    # Once, when the reference first runs in place of kernels.
    global _has_warned
    _has_warned = True
    reason = cpu.why_not() if device_type == "cpu" else gpu.why_not()
    if reason is not None:
        where = "CPU" if device_type == "cpu" else "GPU"
        logging.getLogger("ecanet").warning("ecanet: plain PyTorch runs on the %s: %s", where, reason)
