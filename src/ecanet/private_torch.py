"""Every private name of torch that the library uses, each with a fallback in case torch removes it.

A release of torch may remove any of them. ``import ecanet`` still works, values stay right, and ``ecanet doctor``
says what is missing and what that costs. Two kinds are not listed. Attributes of :class:`torch.nn.Module` with an
underscore (``_modules``, ``_forward_hooks``, ...) are stable, because a pickled module consists of them.
``Tensor._version`` is in torch's documentation.
"""

import pkgutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

#: What this torch lacks: the path of each name, and what happens without it.
missing: dict[str, str] = {}
_NO_KERNELS = "plain PyTorch runs instead of the kernels"


def _find(path: str, without: str, instead: Any = None) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        missing[path] = without
        return instead


def why_no_kernels() -> str | None:
    """None if this torch has everything that the kernels need, otherwise one line that names what is missing."""
    gone = [path for path, without in missing.items() if without == _NO_KERNELS]
    return f"torch {torch.__version__} has no {', '.join(gone)}, which they need" if gone else None


def _always(*_: object) -> bool:
    return True


def _never(*_: object) -> bool:
    return False


# --- What observes the call. Asked at every call, so bound to module names: attribute look-ups are slow on small maps.

#: Whether torch.jit.trace is running. Public: torch.jit.is_tracing, which does more before it asks this.
is_tracing: Callable[[], bool] = _find("torch._C._is_tracing", "calls take longer", torch.jit.is_tracing)

#: Whether a transform of torch.func is running. No public equivalent.
are_transforms_active: Callable[[], bool] = _find("torch._C._are_functorch_transforms_active", _NO_KERNELS, _always)

#: Whether a tensor is wrapped by a transform of torch.func. No public equivalent.
is_transformed: Callable[[torch.Tensor], bool] = _find(
    "torch._C._functorch.is_functorch_wrapped_tensor", "a gate's factor is not read under torch.func", _never
)

#: How many dispatch modes are active, such as that of torch.fx's make_fx. No public equivalent.
count_dispatch_modes: Callable[[], int] = _find(
    "torch._C._len_torch_dispatch_stack", "a gate's factor may be read while a tracer runs", lambda: 0
)

_forward_ad_level = _find("torch.autograd.forward_ad._current_level", _NO_KERNELS)


def is_forward_ad_on() -> bool:
    """Whether forward-mode differentiation is on. Public: ``forward_ad.unpack_dual``, for one tensor at a time."""
    return _forward_ad_level is None or torch.autograd.forward_ad._current_level >= 0


_exporting_flag = _find("torch.compiler._is_exporting_flag", "torch.compiler.is_exporting is asked")


def is_exporting() -> bool:
    """Whether :func:`torch.export.export` is running. Public: torch.compiler.is_exporting.

    In torch 2.11 the public function also returns True under torch.compile.
    """
    if _exporting_flag is None:
        return torch.compiler.is_exporting()
    return torch.compiler._is_exporting_flag


#: Truthy if a global hook (one on all modules) is registered. No public equivalent.
has_any_global_hook: Callable[[], Any] = _find("torch.nn.modules.module._has_any_global_hook", _NO_KERNELS, _always)

#: The global forward pre-hooks and forward hooks, by id. Public: only the handles that their registration returned.
GLOBAL_HOOKS: list[dict[int, Any]] = [
    _find(f"torch.nn.modules.module.{name}", "hooks on all modules run in a dry run", {})
    for name in ("_global_forward_pre_hooks", "_global_forward_hooks")
]

# --- kinds of tensors and modules -----------------------------------------------------------------------------------

#: Tensors without values. No public equivalent.
FakeTensor: Any = _find("torch._subclasses.fake_tensor.FakeTensor", "tensors without values are not recognised", ())

#: The mode that creates them. No public equivalent.
FakeTensorMode: Any = _find("torch._subclasses.fake_tensor.FakeTensorMode", "shapes are found by running a network")

#: Tensors under a compiler's functionalization, and the mode that handles them. No public equivalent.
FunctionalTensor: Any = _find(
    "torch._subclasses.functional_tensor.FunctionalTensor", "an operation stays one node in a compiler's graph", ()
)
FunctionalTensorMode: Any = _find(
    "torch._subclasses.functional_tensor.FunctionalTensorMode", "an operation stays one node in a compiler's graph"
)

_PUBLIC_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PUBLIC_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

#: The base of every BatchNorm. Public: the classes themselves.
BatchNormBase: Any = _find("torch.nn.modules.batchnorm._BatchNorm", "the public classes stand for it", _PUBLIC_NORMS)

#: The base of every norm with running statistics. Public: the classes themselves.
NormBase: Any = _find(
    "torch.nn.modules.batchnorm._NormBase", "the public classes stand for it", (*_PUBLIC_NORMS, *_PUBLIC_INSTANCE_NORMS)
)


def check_rank(norm: Any, x: torch.Tensor) -> bool:
    """Run a norm's own check of the rank of ``x``; return False if it has none. Public: calling the norm.

    Raises:
        ValueError: the norm rejects the rank.
    """
    check = getattr(norm, "_check_input_dim", None)
    if check is not None:
        check(x)
    return check is not None


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is the result of :func:`torch.compile`, or its ``compile()`` was called.

    No public equivalent. If torch renames these attributes, no module is recognised as compiled, and surgery on a
    compiled module takes effect only at the next compilation.
    """
    dynamo = sys.modules.get("torch._dynamo")  # if it is not imported, nothing is compiled; importing takes a second
    wrapper = getattr(dynamo, "OptimizedModule", None)
    return (wrapper is not None and isinstance(module, wrapper)) or (
        getattr(module, "_compiled_call_impl", None) is not None
    )


# --- operations -----------------------------------------------------------------------------------------------------

_below_autograd = _find("torch._C._AutoDispatchBelowAutograd", _NO_KERNELS)

#: A context in which operations bypass autograd. No public equivalent.
BelowAutograd: Callable[[], Any] = nullcontext if _below_autograd is None else _below_autograd


def direct_call(overload: Any) -> Callable[..., Any]:
    """The function that an operation's overload calls, without the overhead. Public: the overload itself."""
    return getattr(overload, "_op", overload)


def has_kernel(operation: str, key: str) -> bool:
    """Whether an operation has a kernel for a dispatch key. No public equivalent; the fallback assumes that it has."""
    return _has_kernel(operation, key)


_has_kernel: Callable[[str, str], bool] = _find(
    "torch._C._dispatch_has_kernel_for_dispatch_key", "an incomplete library of kernels is not recognised", _always
)


def exports_operations_whole() -> bool:
    """Whether an exporter keeps operations as single nodes. No public equivalent; the fallback assumes that it does."""
    try:  # imported only here: it takes 0.3 s
        disabled = pkgutil.resolve_name("torch.export._trace.custom_triton_ops_decomposition_disabled")
    except (ImportError, AttributeError):
        return True
    return disabled()


def name_of_backend(group: Any) -> str:
    """The name by which torch's SyncBatchNorm chooses a collective. Public: torch.distributed.get_backend."""
    asked = getattr(group, "_get_backend_name", None)
    return dist.get_backend(group) if asked is None else asked()
