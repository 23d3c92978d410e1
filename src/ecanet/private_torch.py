"""The names of torch that are not public: all that the library uses, each with what stands for it where it is gone.

A release of torch may take any of them away. ``import ecanet`` works without, values stay right, and ``ecanet doctor``
says what is missing and what that costs. Attributes of :class:`torch.nn.Module` with an underscore (``_modules``,
``_forward_hooks``, ...) are not listed: a pickled module consists of them; nor is ``Tensor._version``, which torch's
documentation names.
"""

import pkgutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

#: Path of what this torch lacks, and what happens without.
missing: dict[str, str] = {}
_NO_KERNELS = "plain PyTorch runs instead of the kernels"


def _find(path: str, without: str, instead: Any = None) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        missing[path] = without
        return instead


def why_no_kernels() -> str | None:
    """None if this torch has what the kernels cannot do without, otherwise one line that names what it lacks."""
    gone = [path for path, without in missing.items() if without == _NO_KERNELS]
    return f"torch {torch.__version__} has no {', '.join(gone)}, which they need" if gone else None


def _always(*_: object) -> bool:
    return True


def _never(*_: object) -> bool:
    return False


# --- who looks on; asked at every call: by their own names, since a look-up takes a part of a small map's time ------

#: Whether torch.jit.trace looks on. Public: torch.jit.is_tracing, which asks this after something else.
is_tracing: Callable[[], bool] = _find("torch._C._is_tracing", "calls take longer", torch.jit.is_tracing)

#: Whether a transform of torch.func looks on. Nothing public tells.
are_transforms_active: Callable[[], bool] = _find("torch._C._are_functorch_transforms_active", _NO_KERNELS, _always)

#: Whether a tensor is that of a transform. Nothing public tells.
is_transformed: Callable[[torch.Tensor], bool] = _find(
    "torch._C._functorch.is_functorch_wrapped_tensor", "a gate's factor is not read under torch.func", _never
)

#: How many modes see each operation, as torch.fx's make_fx does. Nothing public tells.
count_dispatch_modes: Callable[[], int] = _find(
    "torch._C._len_torch_dispatch_stack", "a gate's factor may be read while a tracer looks on", lambda: 0
)

_forward_ad_level = _find("torch.autograd.forward_ad._current_level", _NO_KERNELS)


def is_forward_ad_on() -> bool:
    """Whether forward-mode derivatives are taken. Public: ``forward_ad.unpack_dual``, of one tensor at a time."""
    return _forward_ad_level is None or torch.autograd.forward_ad._current_level >= 0


_exporting_flag = _find("torch.compiler._is_exporting_flag", "torch.compiler.is_exporting is asked")


def is_exporting() -> bool:
    """Whether :func:`torch.export.export` looks on. Public: torch.compiler.is_exporting.

    That says True under torch.compile, too, in torch 2.11.
    """
    if _exporting_flag is None:
        return torch.compiler.is_exporting()
    return torch.compiler._is_exporting_flag


#: Hooks on all modules; what is true where there is one. Nothing public tells.
has_any_global_hook: Callable[[], Any] = _find("torch.nn.modules.module._has_any_global_hook", _NO_KERNELS, _always)

#: Those hooks by number, of calls forward. Public: the handles, which whoever put a hook there has.
GLOBAL_HOOKS: list[dict[int, Any]] = [
    _find(f"torch.nn.modules.module.{name}", "hooks on all modules run in a dry run", {})
    for name in ("_global_forward_pre_hooks", "_global_forward_hooks")
]

# --- kinds of tensors and modules -----------------------------------------------------------------------------------

#: Tensors without values. Nothing public names them.
FakeTensor: Any = _find("torch._subclasses.fake_tensor.FakeTensor", "tensors without values are not recognised", ())

#: Makes them. Nothing public does.
FakeTensorMode: Any = _find("torch._subclasses.fake_tensor.FakeTensorMode", "shapes are found by running a network")

#: Tensors under a compiler's functionalization, and the mode that handles them. Nothing public names them.
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
    """Have a norm refuse a map of another rank than it takes; False where it cannot be asked. Public: calling it.

    Raises:
        ValueError: as the norm.
    """
    check = getattr(norm, "_check_input_dim", None)
    if check is not None:
        check(x)
    return check is not None


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what :func:`torch.compile` made of one, or its ``compile()`` was called.

    Nothing public tells. Where torch names things otherwise, nothing is recognised, and what surgery does to a compiled
    module reaches the next compilation alone.
    """
    dynamo = sys.modules.get("torch._dynamo")  # without it nothing is compiled; to import it takes a second
    wrapper = getattr(dynamo, "OptimizedModule", None)
    return (wrapper is not None and isinstance(module, wrapper)) or (
        getattr(module, "_compiled_call_impl", None) is not None
    )


# --- operations -----------------------------------------------------------------------------------------------------

_below_autograd = _find("torch._C._AutoDispatchBelowAutograd", _NO_KERNELS)

#: A context in which operations do not pass through autograd. Nothing public is one.
BelowAutograd: Callable[[], Any] = nullcontext if _below_autograd is None else _below_autograd


def direct_call(overload: Any) -> Callable[..., Any]:
    """What calling an overload of an operation comes down to. Public: the overload."""
    return getattr(overload, "_op", overload)


def has_kernel(operation: str, key: str) -> bool:
    """Whether an operation has a kernel for a dispatch key. Nothing public tells; without, it is taken to be there."""
    return _has_kernel(operation, key)


_has_kernel: Callable[[str, str], bool] = _find(
    "torch._C._dispatch_has_kernel_for_dispatch_key", "an incomplete library of kernels is not recognised", _always
)


def exports_operations_whole() -> bool:
    """Whether an exporter wants operations as nodes. Nothing public tells; without, it always does."""
    try:  # not imported with torch, since it takes 0.3 s
        disabled = pkgutil.resolve_name("torch.export._trace.custom_triton_ops_decomposition_disabled")
    except (ImportError, AttributeError):
        return True
    return disabled()


def name_of_backend(group: Any) -> str:
    """The name by which torch's SyncBatchNorm chooses a collective. Public: torch.distributed.get_backend."""
    asked = getattr(group, "_get_backend_name", None)
    return dist.get_backend(group) if asked is None else asked()
