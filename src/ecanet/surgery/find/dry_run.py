"""The shapes that a network's modules take and return, from one call without data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ecanet.networks.copies import twin_of
from ecanet.networks.running import example_tensor, running_without_data
from ecanet.surgery.find.layers import CONVOLUTIONS


class Shapes(NamedTuple):
    """Shapes of a module's input and output in a dry run; None if it is not a tensor."""

    input: torch.Size | None
    output: torch.Size | None


class DryRun(NamedTuple):
    """What is known of a network from calling it without data.

    Attributes:
        input_shape: Shape of the input.
        shapes: Shapes at the first call of each module that ran.
        failed: Why the call did not finish, as a phrase that follows "the network"; None if it finished. If not, the
            shapes may come from an input that the network does not take.
    """

    input_shape: tuple[int, ...]
    shapes: dict[nn.Module, Shapes]
    failed: str | None

    def saw_layers(self) -> bool:
        """Whether any module without children ran.

        If not, the code may use the weights of its layers without calling them.
        """
        return any(next(module.children(), None) is None for module in self.shapes)


#: Spatial size of an input, for sound, pictures and video, by the number of spatial dimensions.
_SIZES = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}
_PICTURE = (1, 3, *_SIZES[2])


def dry_run(model: nn.Module, input_shape: Sequence[int] | Literal["auto"] | None) -> DryRun | None:
    """Shapes at the first call of each module when the model runs on an input without data.

    A copy of the network runs. It shares the parameters and has none of the user's hooks. Nothing writes into the
    parameters, and state that the code stores goes into the copy. If the copy's code calls the network itself, the run
    stops before that call does anything.

    Args:
        model: The network.
        input_shape: Shape of the one tensor that it takes; ``"auto"`` for one that fits the network's first
            convolution, or else a picture; None for no run.

    Raises:
        ValueError: a convolution would read an input of that shape as one sample without a batch dimension.
    """
    if input_shape is None:
        return None
    if input_shape != "auto":
        run = _run(model, tuple(input_shape))
        if run.failed == _UNBATCHED:
            raise ValueError(
                f"input_shape={tuple(input_shape)} has too few dimensions: a convolution of the network would read it "
                "as one sample and its channels as a batch: give (N, C, *spatial)"
            )
        return run
    first = next((m for m in model.modules() if isinstance(m, CONVOLUTIONS[:3])), None)
    shapes = [_PICTURE] if first is None else [(1, first.in_channels, *_SIZES[first.weight.dim() - 2]), _PICTURE]
    runs = []
    for shape in dict.fromkeys(shapes):
        runs.append(_run(model, shape))
        if runs[-1].failed is None:
            return runs[-1]
    return max(runs, key=lambda run: len(run.shapes))


_UNBATCHED = "a convolution reads it as one sample without a batch dimension"


class _UnbatchedError(Exception):
    """Holds the shape that a convolution would read as one sample."""


class _CallsTheNetworkError(BaseException):
    """Holds the name of the module that a copy called. No ``except Exception`` in the network's code catches it."""


@contextmanager
def _no_calls_of(model: nn.Module) -> Iterator[None]:
    names = {module: f"the network's {name}" if name else "the network" for name, module in model.named_modules()}

    def refuse(module: nn.Module, args: Any) -> None:
        if module in names:
            raise _CallsTheNetworkError(names[module])

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _refuse_unbatched(convolution: nn.Module, args: Any) -> None:
    weight: Any = convolution.weight
    if args and isinstance(args[0], Tensor) and args[0].dim() < weight.dim():
        raise _UnbatchedError(tuple(args[0].shape))


def _run(model: nn.Module, input_shape: tuple[int, ...]) -> DryRun:
    seen: dict[nn.Module, Shapes] = {}

    def shape_of(value: Any) -> torch.Size | None:
        return value.shape if isinstance(value, Tensor) else None

    def recorder_for(module: nn.Module) -> Callable[..., None]:
        def record(_: nn.Module, args: Any, output: Any) -> None:
            seen.setdefault(module, Shapes(shape_of(args[0]) if args else None, shape_of(output)))

        return record

    example = example_tensor(model)
    try:
        twin = twin_of(model)
    except Exception as error:  # it cannot be copied: for example, it holds a lock or a file
        return DryRun(input_shape, {}, f"cannot be copied for a run without data ({first_line(error)})")
    try:
        originals = dict(zip(twin.modules(), model.modules(), strict=True))
        for copied, original in originals.items():
            if isinstance(copied, CONVOLUTIONS):
                copied.register_forward_pre_hook(_refuse_unbatched)
            copied.register_forward_hook(recorder_for(original))
        with running_without_data(twin), _no_calls_of(model):
            twin(torch.zeros(input_shape, dtype=example.dtype, device=example.device))
    except _UnbatchedError as error:
        does_not_run = f"does not run on an input of shape {input_shape}"
        return DryRun(input_shape, {}, _UNBATCHED if error.args == (input_shape,) else does_not_run)
    except _CallsTheNetworkError as error:
        return DryRun(input_shape, {}, f"cannot be run on a copy, which calls {error} itself")
    except Exception as error:  # it takes another input, or reads values, as YOLO's head does
        return DryRun(input_shape, seen, f"does not run on an input of shape {input_shape} ({first_line(error)})")
    return DryRun(input_shape, seen, None)


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
