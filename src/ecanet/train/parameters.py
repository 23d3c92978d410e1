"""Freezes parameters by name, puts the others into groups with their own rate and decay, and builds the optimiser."""

import difflib
import fnmatch
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ecanet.networks.running import gates
from ecanet.nn.norms import is_norm
from ecanet.train.config import OptimConfig
from ecanet.untrusted import shown


def freeze_(network: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Exclude parameters from training, by names and patterns in order; later ones override earlier ones.

    Args:
        network: The network.
        patterns: Names of modules, which include everything in them, or of parameters; or shell patterns, whose ``*``
            also matches dots. What a pattern after a ``!`` matches is trained.

    Returns:
        The norms that must keep their statistics: those that are frozen or in a frozen module, and those whose
        parameters are all frozen.

    Raises:
        ValueError: a pattern matches no name, or nothing is frozen, or everything is.

    Example:
        >>> from ecanet.models import small_eca_resnet
        >>> network = small_eca_resnet()
        >>> len(freeze_(network, ["*", "!*.eca", "!fc"]))
        9
        >>> [name for name, p in network.named_parameters() if p.requires_grad][-2:]
        ['fc.weight', 'fc.bias']
    """
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    names = [name for name in modules if name] + list(parameters)
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatch.fnmatchcase(name, pattern.removeprefix("!"))}
        if not matched:
            raise ValueError(f"optim.freeze: {_no_such_name(pattern.removeprefix('!'), names)}")
        covered = {name for name in names if matched.intersection(_prefixes(name))}
        frozen = frozen - covered if pattern.startswith("!") else frozen | covered
    for name in frozen & parameters.keys():
        parameters[name].requires_grad_(False)
    if patterns and not any(p.requires_grad for p in parameters.values()):
        raise ValueError(f"optim.freeze={_shown(patterns)} leaves nothing to train: add what to train, such as !fc")
    if patterns and not frozen:
        raise ValueError(f"optim.freeze={_shown(patterns)} freezes nothing: begin with what to freeze, such as *")
    return [module for name, module in modules.items() if _has_statistics(module) and _is_frozen(name, module, frozen)]


def _prefixes(name: str) -> Iterator[str]:
    """A name, and the names of the modules that contain it."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _has_statistics(module: nn.Module) -> bool:
    return is_norm(module) or "running_mean" in module._buffers or "running_var" in module._buffers


def _is_frozen(name: str, module: nn.Module, frozen: set[str]) -> bool:
    own = list(module.parameters(recurse=False))
    return name in frozen or (bool(own) and not any(p.requires_grad for p in own))


def _no_such_name(pattern: str, names: Sequence[str]) -> str:
    plain = pattern.replace("*", "").replace("?", "").strip(".")
    first_with_end = {name.rpartition(".")[2]: name for name in reversed(names)}
    ends = difflib.get_close_matches(plain.rpartition(".")[2], first_with_end, 3, 0.6)
    close = difflib.get_close_matches(plain, names, 3, 0.6) or [first_with_end[end] for end in ends]
    near = f", the closest are {', '.join(map(repr, close))}" if close else ""
    return f"{shown(pattern)!r} matches no module and no parameter of the network{near}"


def _shown(patterns: Sequence[str]) -> str:
    return shown(",".join(patterns), 200)


def parameter_groups(network: nn.Module, optim: OptimConfig) -> list[dict[str, object]]:
    """The parameters to train, in groups with the same learning rate and weight decay.

    Parameters of gates are all those in a gate; parameters of norms are their weights and biases; biases are all
    parameters whose name ends in ``bias``, in any module.

    Args:
        network: The network; parameters without ``requires_grad`` are left out.
        optim: The recipe's ``optim`` block.

    Returns:
        Parameter groups for an optimiser: ``params``, ``lr``, ``weight_decay``.
    """
    in_gates = {id(p) for gate in gates(network).values() for p in gate.parameters()}
    in_norms = {id(p) for m in network.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        kinds = {"gates"} if id(parameter) in in_gates else set()
        kinds |= {"norms"} if id(parameter) in in_norms else set()
        kinds |= {"biases"} if name.endswith("bias") else set()
        lr = optim.rate * optim.gate_lr_scale if "gates" in kinds else optim.rate
        decay = 0.0 if kinds.intersection(optim.no_decay) else optim.decay
        groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def build_optimizer(network: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Build SGD or AdamW for the parameters to train.

    Args:
        network: The network.
        optim: The recipe's ``optim`` block.
    """
    groups = parameter_groups(network, optim)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, betas=(optim.momentum, 0.999))
    assert optim.name == "sgd"
    return torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov)
