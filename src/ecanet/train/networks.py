"""Builds the network of a recipe's ``model`` block, checks it, and rebuilds it from a checkpoint."""

import copy
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.files.state_dicts import describe, misfits
from ecanet.models import build_model
from ecanet.networks.checks import check_model
from ecanet.surgery.insertion_file import Create, Insertion, read, rebuild
from ecanet.train.config import ModelConfig, is_network_name
from ecanet.untrusted import shown


def build_network(config: ModelConfig, num_classes: int, image_size: int | None = None) -> nn.Module:
    """Build the network of a recipe's ``model`` block, in training mode.

    Args:
        config: The block.
        num_classes: Number of classes of the network's head.
        image_size: Height and width of pictures, in pixels, on which the network is tried; None does not try it.

    Raises:
        ImportError: it needs timm, which is not installed, or a function of yours that cannot be imported.
        OSError: there is no such file of weights, or a library cannot download its own.
        TypeError: ``options`` has an argument that the network does not take.
        ValueError: it does not classify such pictures; or the network's class or function, or
            :func:`ecanet.insert_gates_`, raises it.
    """
    if not config.is_own:
        config = without_insertion_file(config)
        model, _ = _insertion(config, num_classes).build(config.weights, new_head=True, create=_create(config))
        if image_size is not None:
            check_classifies(model, num_classes, image_size)
        return model.train()
    try:
        return build_model(
            config.name,
            gate=config.gate,
            kernel_size=config.kernel_size,
            neutral=bool(config.preserve),
            weights=config.weights,
            num_classes=num_classes,
            **config.options,
        )
    except TypeError as error:
        raise TypeError(f"{config.name} cannot be built with model.options={config.options}: {error}") from error


def rebuild_network(config: ModelConfig, num_classes: int, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Build the network that a checkpoint describes, with its weights, in eval mode.

    Args:
        config: The checkpoint's ``model`` block, without a file of weights.
        num_classes: Number of classes.
        state: The weights.
        path: The checkpoint, for errors.

    Raises:
        ValueError: the weights do not match the network.
    """
    if not config.is_own:
        return rebuild(_insertion(config, num_classes), state, path, f"{num_classes} classes", _create(config))
    what = f"the weights in {path} do not fit the network that it describes"
    options: dict[str, Any] = config.options
    if options.get("blocks", 1) * len(options.get("widths", ())) > len(state):
        raise ValueError(f"{what}, which has more blocks")
    with torch.device("meta"):  # the file may claim any size, so allocate no memory before the check
        own = build_network(config, num_classes).state_dict()
    missing = [key for key in own if key not in state]
    if problems := describe(missing=missing, **misfits(state, own)):
        raise ValueError(f"{what}: {problems}")
    network = build_network(config, num_classes)
    network.load_state_dict(state)
    return network.eval()


def without_insertion_file(config: ModelConfig) -> ModelConfig:
    """If ``name`` is a file of ``ecanet insert --save``, the same network by its name in its library.

    Raises:
        ValueError: the file is damaged, or the block has other gates than the file.
    """
    if config.build is not None or is_network_name(config.name):
        return config
    insertion, _, _ = read(config.name)
    in_file = {
        "gate": insertion.gate,
        "kernel_size": insertion.kernel_size,
        "where": insertion.where if isinstance(insertion.where, str) else list(insertion.where),
        "preserve": insertion.preserve,
        "weights": config.name,
        "options": {name: True for name in ("fold", "fuse") if getattr(insertion, name)},
    }
    default = ModelConfig()
    for name, value in in_file.items():
        if getattr(config, name) not in (value, getattr(default, name)):
            raise ValueError(
                f"model.{name}={shown(str(getattr(config, name)))} is not what {shown(config.name, 200)} holds, "
                f"{shown(str(value), 200)}: leave it out, or write another file with ecanet insert"
            )
    return ModelConfig(insertion.model, **in_file)  # type: ignore[arg-type]


def without_weights_file(config: ModelConfig) -> ModelConfig:
    """The same network without its initial weights, with ``preserve`` as it is with them."""
    preserve = config.weights is not None if config.preserve is None else config.preserve
    return replace(config, weights=None, preserve=preserve)


def check_classifies(network: nn.Module, num_classes: int, image_size: int) -> None:
    """Check that a network takes pictures of this size and returns one number for each class.

    Args:
        network: A network on the CPU; a copy of it is run.
        num_classes: Number of classes.
        image_size: Height and width of the pictures, in pixels.

    Raises:
        ValueError: it does not; the message says what it raised or returned.
    """
    name, shape = type(network).__name__, (2, 3, image_size, image_size)
    twin = copy.deepcopy(network)
    for training in (False, True):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = twin.train(training)(torch.zeros(shape))
        except Exception as error:
            why = f"{type(error).__name__}: {shown(' '.join(str(error).split()), 200)}"
            raise ValueError(
                f"the network ({name}) does not take pictures of shape {shape}{' in training' if training else ''} "
                f"({why}): set data.image_size to a size that it takes"
            ) from error
        # In training a network with auxiliary heads returns their logits, too.
        for logits in output if training and isinstance(output, tuple) else (output,):
            if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
                got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                raise ValueError(
                    f"the network ({name}) must return logits (N, {num_classes}), got {got} for N = 2: it does not "
                    "classify pictures, so it cannot be trained here"
                )


def _insertion(config: ModelConfig, num_classes: int) -> Insertion:
    options: dict[str, Any] = config.options
    kernel_size: Any = config.kernel_size
    return Insertion(
        model=config.name if config.build is None else config.build,
        gate=config.gate,
        where=config.where if isinstance(config.where, str) else tuple(config.where),
        kernel_size=kernel_size,
        preserve=config.weights is not None if config.preserve is None else config.preserve,
        num_classes=num_classes,
        **options,
    )


def _create(config: ModelConfig) -> Create | None:
    """The user's function that builds the network without gates, or None."""
    return None if config.build is None else partial(_call, config.build, import_function(config.build))


def _call(name: str, function: Callable[[int | None], Any], num_classes: int | None) -> nn.Module:
    what = f"model.build={name}, called with the number of classes, {num_classes}"
    try:
        model = function(num_classes)
        check_model(model)
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from error
    except Exception as error:  # the user's code may raise anything
        raise RuntimeError(f"{what}: {type(error).__name__}: {error}") from error
    return model


def import_function(name: str) -> Callable[[int | None], Any]:
    """Import a function of the user; modules in the working folder are found, too, with the lowest priority.

    Args:
        name: ``module:function``, which must come from the user and not from a file.

    Raises:
        ImportError: there is no such module, or it fails.
        ValueError: it has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ImportError(
            f"model.build={name}: {module_name} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"model.build={name}: {module_name} has no function {function_name}")
    return function
