"""What a network's modules take and return, from one call without data."""

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
    """What went into a module and what came out in a dry run; None for what is no tensor."""

    input: torch.Size | None
    output: torch.Size | None


class DryRun(NamedTuple):
    """What is known of a network from calling it without data.

    Attributes:
        input_shape: Of the input.
        shapes: At the first call of each module that ran.
        failed: Why the call came to no end, as what the network "does not" or "cannot"; None if it did. The shapes
            then are those of an input that the network need not take.
    """

    input_shape: tuple[int, ...]
    shapes: dict[nn.Module, Shapes]
    failed: str | None

    def saw_layers(self) -> bool:
        """Whether any module without children ran: a network may compute with their weights alone."""
        return any(next(module.children(), None) is None for module in self.shapes)


#: Positions of a map in each dimension, by the number of dimensions: of sounds, pictures and films.
_SIZES = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}
_PICTURE = (1, 3, *_SIZES[2])


def dry_run(model: nn.Module, input_shape: Sequence[int] | Literal["auto"] | None) -> DryRun | None:
    """Shapes at the first call of each module when the model runs on an input without data.

    A copy runs, without the hooks of others, on the network's own parameters, which nothing writes into: what a network
    keeps from a run stays out of it. Where the copy's code calls the network, the run ends before that does anything.

    Args:
        model: The network.
        input_shape: Of one tensor; ``"auto"`` for one that fits the network's first convolution, or a picture; None for
            no run.

    Raises:
        ValueError: a convolution takes an input of that shape for one sample without a batch.
    """
    if input_shape is None:
        return None
    if input_shape != "auto":
        run = _run(model, tuple(input_shape))
        if run.failed == _UNBATCHED:
            raise ValueError(
                f"input_shape={tuple(input_shape)} has the dimensions of one sample for a convolution of the network, "
                "which would take its channels for a batch: give (N, C, *spatial)"
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


_UNBATCHED = "a convolution takes it for one sample without a batch"


class _UnbatchedError(Exception):
    """Holds the shape that a convolution took for one sample."""


class _CallsTheNetworkError(BaseException):
    """Holds the name of the module that a copy called: of no ``except Exception`` in the network's code."""


@contextmanager
def _not_calling(model: nn.Module) -> Iterator[None]:
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

    def see_as(module: nn.Module) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, output: Any) -> None:
            seen.setdefault(module, Shapes(shape_of(args[0]) if args else None, shape_of(output)))

        return see

    example = example_tensor(model)
    try:
        twin = twin_of(model)
    except Exception as error:  # it holds a lock, say, or a file
        return DryRun(input_shape, {}, f"cannot be copied for a run without data ({_first_line(error)})")
    try:
        originals = dict(zip(twin.modules(), model.modules(), strict=True))
        for copied, original in originals.items():
            if isinstance(copied, CONVOLUTIONS):
                copied.register_forward_pre_hook(_refuse_unbatched)
            copied.register_forward_hook(see_as(original))
        with running_without_data(twin), _not_calling(model):
            twin(torch.zeros(input_shape, dtype=example.dtype, device=example.device))
    except _UnbatchedError as error:
        does_not_run = f"does not run on an input of shape {input_shape}"
        return DryRun(input_shape, {}, _UNBATCHED if error.args == (input_shape,) else does_not_run)
    except _CallsTheNetworkError as error:
        return DryRun(input_shape, {}, f"cannot be run on a copy, which calls {error} itself")
    except Exception as error:  # it wants another input, or looks at values, as YOLO's head does
        return DryRun(input_shape, seen, f"does not run on an input of shape {input_shape} ({_first_line(error)})")
    return DryRun(input_shape, seen, None)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
