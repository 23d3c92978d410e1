"""Loads a plain network's weights into a network with gates without changing the function that it computes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights

from ecanet.files.state_dicts import StateDict, describe, misfits, read_state_dict, state_dict_in
from ecanet.models.eca_keys import eca_kernel_sizes
from ecanet.models.hub import HubModel
from ecanet.models.neutral import make_neutral_
from ecanet.nn.folding import check_foldable, fold_factors_

PlainWeights: TypeAlias = str | os.PathLike[str] | WeightsEnum | StateDict
Network = TypeVar("Network", bound=HubModel)


def load_plain_weights(model: Network, weights: PlainWeights, *, fold: bool = False) -> Network:
    """Load a plain network's weights into one with gates, without changing the function that the network computes.

    Training starts from the plain network: every gate becomes 1 (with w = 0 its sigmoid is 1/2, and its factor 2 undoes
    that exactly), and nothing else changes. If the classifier's shape differs from the model's, the model keeps its own
    classifier.

    Args:
        model: A network of :mod:`ecanet.models`; changed in place.
        weights: torchvision's weights (an enum, or its name such as ``"IMAGENET1K_V1"``, which torchvision
            downloads), a file, or a state dict with torchvision's keys.
        fold: Fold the gates' factors into the norms before them, so that the model has the keys of the authors' files:
            :func:`ecanet.fold_factors_`.

    Returns:
        ``model``; its ``config`` now says that its gates are neutral.

    Raises:
        FileNotFoundError, ImportError: as :func:`read_state_dict`.
        ValueError: keys are missing, unexpected or of the wrong shape; the state dict already has gates; a gate cannot
            be constant (SE-Var1 has no weights); or with ``fold``, a norm cannot take its gate's factor. The model is
            then unchanged.

    Example:
        >>> import torchvision
        >>> from ecanet.models import eca_resnet18
        >>> plain = torchvision.models.resnet18().eval()
        >>> model = load_plain_weights(eca_resnet18(), plain.state_dict()).eval()
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.allclose(model(x), plain(x), atol=1e-5)
        True
    """
    state = _state_dict_of(weights, model.backbone)
    own = model.state_dict()
    gates = {id(gate) for _, gate in model.gated_norms()}
    gate_keys = {
        f"{name}.{key}" for name, module in model.named_modules() if id(module) in gates for key in module.state_dict()
    }
    if eca_kernel_sizes(state) or any(key in state for key in gate_keys):
        raise ValueError(
            "weights already have gates, so they are not a plain network's: load them with "
            "model.load_state_dict(weights), or a released checkpoint with ecanet.models.load_official(path)"
        )
    optional = gate_keys
    classifier = model.classifier_name.split(".")[0] + "."
    if _shapes(state, classifier) != _shapes(own, classifier):
        state = {key: value for key, value in state.items() if not key.startswith(classifier)}
        optional |= {key for key in own if key.startswith(classifier)}
    missing = [
        key for key in own if key not in state and key not in optional and not key.endswith("num_batches_tracked")
    ]
    problems = describe(missing=missing, **misfits(state, own))
    if problems:
        raise ValueError(f"weights do not fit {model.backbone}: {problems}")
    if fold:
        check_foldable(model)
    make_neutral_(model)
    model.load_state_dict(state, strict=False)
    if fold:
        fold_factors_(model)
    model._record_factor(neutral=True, fold=fold)
    return model


def _state_dict_of(weights: PlainWeights, backbone: str) -> dict[str, Tensor]:
    if isinstance(weights, WeightsEnum):
        return _download(weights)
    if isinstance(weights, Mapping):
        return state_dict_in(weights, "weights")
    if isinstance(weights, str) and not Path(weights).exists() and not Path(weights).suffix:
        return named_weights(backbone, weights)
    return read_state_dict(weights)


def named_weights(backbone: str, name: str) -> dict[str, Tensor]:
    """The state dict of torchvision's weights, which torchvision downloads unless it has them.

    Args:
        backbone: torchvision's name of the network.
        name: Its name for the weights, such as ``"IMAGENET1K_V1"``, or ``"DEFAULT"``.

    Raises:
        OSError: they cannot be downloaded.
        ValueError: no such name.
    """
    try:
        names = [entry.name for entry in get_model_weights(backbone)]
    except ValueError:
        names = []
    if not names or name not in (*names, "DEFAULT"):
        raise ValueError(
            f"weights={name!r} is neither a file nor a name of torchvision's weights for {backbone}: "
            f"{', '.join(names) or 'there are none'}"
        )
    return _download(get_model_weights(backbone)[name])


def _download(weights: WeightsEnum) -> dict[str, Tensor]:
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except OSError as error:
        raise OSError(
            f"{weights} could not be downloaded from {weights.url} ({error}): without a network, pass a file's path"
        ) from error


def _shapes(state: StateDict, prefix: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if key.startswith(prefix)}
