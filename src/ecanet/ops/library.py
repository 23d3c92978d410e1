"""Registers the operations with torch: schemas, fakes (shapes without data), derivatives and the fallback.

``torch.ops.ecanet.NAME`` takes the arguments of ``NAME`` in :mod:`ecanet.ops.reference`, or in
:mod:`ecanet.ops.coefficients` for what comes between the passes over a map. That function runs where nothing faster is
registered: the C++ library adds implementations for the CPU, :mod:`ecanet.ops.gpu` those for GPUs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecanet.ops import coefficients, cpu, gpu, reference
from ecanet.ops.backward import Saved, between_passes, first_pass, for_slope, second_pass
from ecanet.ops.gpu_maps import dense
from ecanet.private_torch import (
    BelowAutograd,
    FunctionalTensor,
    FunctionalTensorMode,
    exports_operations_whole,
    why_no_kernels,
)

_NORM = "Tensor? norm_mean, Tensor? norm_var, Tensor? weight, Tensor? bias, float eps"
_BAND = "Tensor? kernel, bool circular"
_FACTOR = "float factor=1.0"

_SCHEMAS = {
    "squeeze": "(Tensor x) -> Tensor",
    "moments": "(Tensor x) -> (Tensor, Tensor)",
    "batch_moments": "(Tensor x, bool needs_m2=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "apply": "(Tensor x, Tensor scale, Tensor? shift, Tensor? residual, int act) -> Tensor",
    "apply_": "(Tensor(a!) x, Tensor scale, Tensor? shift, Tensor? residual, int act) -> ()",
    "apply_backward": "(Tensor grad, Tensor x, Tensor scale, Tensor? shift, Tensor? center, Tensor? saved, int act, "
    "bool needs_d) -> (Tensor, Tensor, Tensor)",
    "input_backward": "(Tensor grad, Tensor x, Tensor scale, Tensor? shift, Tensor? saved, int act, Tensor offset, "
    "Tensor? slope, Tensor? center) -> Tensor",
    "eca_coefficients": f"(Tensor map_means, {_NORM}, {_BAND}, {_FACTOR}) -> (Tensor, Tensor, Tensor, Tensor)",
    "eca_coefficients_backward": "(Tensor p, Tensor q, Tensor map_means, Tensor? gate, Tensor? grad_s, "
    f"{_NORM}, {_BAND}, SymInt positions, {_FACTOR}, Tensor? m2=None, Tensor? grad_v=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "batch_norm_eca_add_act": "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, "
    f"{_BAND}, int act, {_FACTOR}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "norm_eca_add_act": f"(Tensor x, Tensor? residual, {_NORM}, {_BAND}, int act, {_FACTOR}) -> Tensor",
    "norm_eca_add_act_": f"(Tensor(a!) x, Tensor? residual, {_NORM}, {_BAND}, int act, {_FACTOR}) -> ()",
}


def _squeeze(x: Tensor) -> Tensor:
    map_means = reference.squeeze(x, x.shape[1])
    return map_means.clone() if x.dim() == 2 else map_means


def _in_place(function: Callable[..., Tensor]) -> Callable[..., None]:
    def run(x: Tensor, *args: Any) -> None:
        x.copy_(function(x, *args))

    return run


def _batch_norm_eca_add_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: Tensor | None,
    circular: bool,
    act: int,
    factor: float = 1.0,
) -> tuple[Tensor, ...]:
    ops = torch.ops.ecanet
    map_means, mean, var, _ = ops.batch_moments(x)
    band = None if kernel is None else kernel.reshape(-1)
    _, gate, scale, shift = ops.eca_coefficients(map_means, mean, var, weight, bias, eps, band, circular, factor)
    return ops.apply(x, scale, shift, residual, act), map_means, mean, var, gate, scale, shift


_REFERENCES: dict[str, Callable[..., Any]] = {
    "squeeze": _squeeze,
    "apply_": _in_place(reference.apply),
    "norm_eca_add_act_": _in_place(coefficients.norm_eca_add_act),
    "batch_norm_eca_add_act": _batch_norm_eca_add_act,
    **{name: getattr(reference, name) for name in _SCHEMAS if hasattr(reference, name) and name != "squeeze"},
    "eca_coefficients": coefficients.eca_coefficients,
    "eca_coefficients_backward": coefficients.eca_coefficients_backward,
    "norm_eca_add_act": coefficients.norm_eca_add_act,
}


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(dense(x))


def _small(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=reference.accumulation_dtype(x.dtype))


def _fake_apply_backward(grad: Any, x: Tensor, *rest: Any) -> Any:
    return (_like(x) if rest[-1] else x.new_empty(0)), _small(x, *x.shape[:2]), _small(x, *x.shape[:2])


def _fake_coefficients(map_means: Tensor, *rest: Any) -> Any:
    n, c = map_means.shape
    return (
        _small(map_means, n, c),
        _small(map_means, 0 if rest[5] is None else n, c),
        _small(map_means, n, c),
        _small(map_means, n, c),
    )


def _fake_coefficients_backward(p: Any, q: Any, map_means: Tensor, *rest: Any) -> Any:
    n, c = map_means.shape
    kernel = rest[7]
    k = 0 if kernel is None else kernel.numel()
    has_grad_v = len(rest) > 12 and rest[12] is not None
    gradients = (_small(map_means, size) for size in (c, c, k, c, c))
    return _small(map_means, n, c), *gradients, _small(map_means, n if has_grad_v else 0, c)


def _fake_batch_moments(x: Tensor, needs_m2: bool = False) -> Any:
    n, c = x.shape[:2]
    return _small(x, n, c), _small(x, c), _small(x, c), _small(x, n if needs_m2 else 0, c)


def _fake_batch_norm_eca_add_act(
    x: Tensor, residual: Any, weight: Any, bias: Any, eps: float, kernel: Any, *_: Any
) -> Any:
    n, c = x.shape[:2]
    gates = _small(x, 0 if kernel is None else n, c)
    return _like(x), _small(x, n, c), _small(x, c), _small(x, c), gates, _small(x, n, c), _small(x, n, c)


_FAKES: dict[str, Callable[..., Any]] = {
    "squeeze": lambda x: _small(x, *x.shape[:2]),
    "batch_moments": _fake_batch_moments,
    "moments": lambda x: (_small(x, *x.shape[:2]), _small(x, *x.shape[:2])),
    "apply": lambda x, *_: _like(x),
    "apply_": lambda *_: None,
    "apply_backward": _fake_apply_backward,
    "input_backward": lambda grad, x, *_: _like(x),
    "eca_coefficients": _fake_coefficients,
    "eca_coefficients_backward": _fake_coefficients_backward,
    "batch_norm_eca_add_act": _fake_batch_norm_eca_add_act,
    "norm_eca_add_act": lambda x, *_: _like(x),
    "norm_eca_add_act_": lambda *_: None,
}


def _checking_devices(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake that rejects tensors on several devices, as the real operation does."""

    def run(*args: Any) -> Any:
        devices = {str(arg.device) for arg in args if isinstance(arg, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"ecanet::{name}: all tensors must be on one device, got {sorted(devices)}")
        return fake(*args)

    return run


def _with_promised_layout(function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The reference, its outputs given the strides and types that the fake promises and the C++ kernels return."""

    def run(*args: Any) -> Any:
        outputs, promised = function(*args), fake(*args)
        if outputs is None:
            return None
        taken = {_storage_address(arg) for arg in args if isinstance(arg, Tensor)}
        if isinstance(outputs, Tensor):
            return _as_promised(outputs, promised, taken)
        return tuple(_as_promised(output, like, taken) for output, like in zip(outputs, promised, strict=True))

    return run


def _as_promised(output: Tensor, promised: Tensor, taken: set[int]) -> Tensor:
    """The output itself if it has the promised strides and type and shares no memory; otherwise a copy that does."""
    fits = (output.stride(), output.dtype) == (promised.stride(), promised.dtype)
    if not fits or _storage_address(output) in taken:
        return promised.copy_(output)
    taken.add(_storage_address(output))
    return output


def _storage_address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _triton_or(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The Triton kernels where they can run; otherwise, and for empty tensors, the reference."""
    launch = getattr(gpu, name)

    def run(*args: Any) -> Any:
        if args[0].numel() == 0 or gpu.why_not() is not None:
            return otherwise(*args)
        return launch(*args)

    return run


def _decomposed_for_compilers(name: str) -> Callable[..., Any]:
    """The rule for a compiler's functionalization: on a GPU it sees the kernel launches, as with ``triton_op``."""
    launches = _batch_norm_eca_add_act if name == "batch_norm_eca_add_act" else getattr(gpu, name)

    def run(mode: Any, operation: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _can_be_decomposed(args):
            return mode.__torch_dispatch__(operation, types, args, kwargs)
        with mode:
            return launches(*args)

    return run


def _can_be_decomposed(args: tuple[Any, ...]) -> bool:
    """Whether the Triton kernels can run and their launches are known at trace time.

    With symbolic sizes they are not, because tiles and splits depend on sizes. Exported programs keep the operations.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    numbers = [*args, *(n for t in tensors for n in t.shape)]
    if (
        not all(type(t) is FunctionalTensor and t.is_cuda for t in tensors)
        or tensors[0].numel() == 0
        or any(isinstance(n, torch.SymInt) for n in numbers)
        or gpu.why_not() is not None
        or gpu.interpreting()
    ):
        return False
    return not exports_operations_whole()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.others = [None if is_tensor else value for value, is_tensor in zip(inputs, ctx.is_tensor, strict=True)]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _backward_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient from torch's own autograd through the reference: slow, exact, and differentiable itself."""

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [
                next(saved) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
            ]
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            for i in wanted:
                inputs[i] = inputs[i].view_as(inputs[i]) if create_graph else inputs[i].detach().requires_grad_()
            outputs = function(*inputs)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            gradients = torch.autograd.grad(
                [o for o, _ in pairs],
                [inputs[i] for i in wanted],
                [g.to(o.dtype) for o, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        result: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(wanted, gradients, strict=True):
            result[i] = gradient
        return tuple(result)

    return backward


def _save_for_batch_norm_eca_add_act(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.eps, kernel, ctx.circular, ctx.act, ctx.factor = inputs
    out, *small = output
    ctx.save_for_backward(x, for_slope(ctx.act, out, residual), weight, bias, kernel, *small)
    ctx.mark_non_differentiable(*small)


def _batch_norm_eca_add_act_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The two passes of the backward, as operations that appear in a compiler's graph."""
    ops = torch.ops.ecanet
    x, for_act, weight, bias, kernel, map_means, mean, var, gate, scale, shift = ctx.saved_tensors
    gate, flat = (None, None) if kernel is None else (gate, kernel.reshape(-1))
    saved = Saved(x, for_act, weight, bias, map_means, mean, var, None, None, gate, scale, shift)
    needs_x, needs_residual = ctx.needs_input_grad[:2]
    up = first_pass(ops, saved, grad, ctx.act, needs_residual)
    small = between_passes(ops, saved, up, ctx.eps, (flat, ctx.circular, ctx.factor))
    batch = small.norm_mean, small.norm_var, x.shape[0] * x.shape[2:].numel()
    return (
        second_pass(ops, saved, up, small, batch) if needs_x else None,
        up.grad if needs_residual else None,
        None if weight is None else small.weight.to(weight.dtype),
        None if bias is None else small.bias.to(bias.dtype),
        None,
        None if kernel is None else small.kernel.reshape(kernel.shape).to(kernel.dtype),
        None,
        None,
        None,
    )


def _without_derivative(name: str, plain: Callable[..., None]) -> Callable[..., None]:
    """An in-place operation that runs below autograd; it raises if a gradient would be lost."""
    operation = plain if why_no_kernels() else getattr(torch.ops.ecanet, name).default

    def run(x: Tensor, *args: Any) -> None:
        tensors = [x, *(arg for arg in args if isinstance(arg, Tensor))]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                f"ecanet::{name} works in place and has no derivative: call it under torch.no_grad(), "
                f"or ecanet::{name[:-1]}"
            )
        with BelowAutograd():
            operation(x, *args)
        torch.autograd.graph.increment_version(x)

    return run


_library = torch.library.Library("ecanet", "DEF")
# The operations accept any strides: Inductor makes convolutions channels last and need not convert maps back and forth.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=_TAGS)
    _plain = _with_promised_layout(_REFERENCES[_name], _FAKES[_name])
    _library.impl(_name, _plain, "CompositeExplicitAutograd")
    if hasattr(gpu, _name):
        _library.impl(_name, _triton_or(_name, _plain), "CUDA")
    torch.library.register_fake(f"ecanet::{_name}", _checking_devices(_name, _FAKES[_name]), lib=_library)
    if _name.endswith("_"):
        _library.impl(_name, _without_derivative(_name, _plain), "Autograd")
        continue
    # In-place operations stay one node: Inductor then lets them write in place; decomposed, they would copy the map.
    if FunctionalTensorMode is not None:
        _rule = _decomposed_for_compilers(_name)
        torch.library.register_torch_dispatch(f"ecanet::{_name}", FunctionalTensorMode, _rule, lib=_library)
    _derivative: tuple[Callable[..., Any], Callable[..., None]] = _backward_of(_REFERENCES[_name]), _setup_context
    if _name == "batch_norm_eca_add_act":
        _derivative = _batch_norm_eca_add_act_backward, _save_for_batch_norm_eca_add_act
    torch.library.register_autograd(f"ecanet::{_name}", _derivative[0], setup_context=_derivative[1], lib=_library)
cpu.load()
