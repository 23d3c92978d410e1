"""Whole networks on a GPU: a step of training and a call at inference, eager, compiled and in CUDA graphs."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timm.layers import EcaModule
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

import ecanet
from benchmarks.cases import Case, Setup, Work
from benchmarks.networks import NETWORKS
from ecanet.ops import backend
from ecanet.profile.turns import Competitor
from ecanet.profile.work import settle

NAMES = ("timm", "ecanet", "no gate", "SE")
#: For each of the library's forms under torch.compile, the other one. The one that is not the default competes, too.
OTHER_FORM = {"formula": "operation", "operation": "formula"}
#: How a network runs, and the options of torch.compile; None: not compiled.
MODES: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {}, "graphs": {"mode": "reduce-overhead"}}
#: For --quick: small enough for an interpreter.
QUICK_NETWORK, _QUICK_SHAPE = "small_resnet", (2, 3, 8, 8)
_small = partial(ecanet.models.small_eca_resnet, widths=[8, 16], num_classes=1000)
_QUICK_BUILDERS = {
    "timm": partial(_small, EcaModule),
    "ecanet": _small,
    "no gate": partial(_small, None),
    "SE": partial(_small, lambda channels: SqueezeExcitation(channels, 4)),
}
#: Network, mode and batch, the most informative first: ResNet-50, then the others if time is left.
_FIRST = (("resnet50", "compiled", 256), ("resnet50", "eager", 256))
_THEN = (
    ("mobilenet_v2", "compiled", 256),
    ("ecaresnet50d", "eager", 256),
    ("ecaresnet50d", "compiled", 256),
    ("resnet50", "graphs", 128),
    ("resnet101", "compiled", 128),
    ("mobilenet_v2", "eager", 256),
    ("resnet50", "compiled", 128),
    ("resnet101", "eager", 128),
)


def network_cases(quick: bool, compiled: bool, setup: Setup, first: bool) -> Iterator[Case]:
    """Networks, channels last, in the type of ``setup``.

    Args:
        quick: One small network.
        compiled: Whether to compile.
        setup: Device and type.
        first: Whether to yield ResNet-50, compiled and eager; otherwise the others.
    """
    plan = _FIRST if first else _THEN
    if quick:
        plan = tuple((QUICK_NETWORK, mode, 2) for mode in (("compiled", "eager") if first else ("graphs",)))
    for network, mode, batch in plan:
        if MODES[mode] is not None and not compiled:
            continue
        shape = _QUICK_SHAPE if quick else (batch, 3, 224, 224)
        for what in ("training", "inference"):
            work = partial(build, what, setup, network, MODES[mode], shape)
            yield Case("network", f"{network}-{what}-{mode}", shape, "channels_last", work, setup.device)


def other_form(what: str) -> str:
    """The form of the tail that is not the default in ``training``, or at ``inference``."""
    return OTHER_FORM[backend.FORMS_ON_GPU[what]]


def _context(name: str, setup: Setup, grad: bool) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(setup.context(grad=grad))
    if name in OTHER_FORM:
        stack.enter_context(patch.dict(backend.FORMS_ON_GPU, dict.fromkeys(backend.FORMS_ON_GPU, name)))
    return stack


def _models(
    setup: Setup, network: str, options: dict[str, Any] | None, what: str, only: Collection[str] | None
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each network, and what is called: the network itself or the result of torch.compile."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = only is None  # the same convolutions for all; off if nothing is timed
    builders = _QUICK_BUILDERS if network == QUICK_NETWORK else NETWORKS[network]
    names = NAMES if options is None else (*NAMES, other_form(what))
    wanted = [name for name in names if only is None or name in only]
    models = {name: builders["ecanet" if name in OTHER_FORM else name]() for name in wanted}
    if only is None:
        plain = models["no gate"].state_dict()
        for name in wanted:
            if name not in ("no gate", "SE"):
                models[name].load_state_dict({**models["timm"].state_dict(), **plain})
    for model in models.values():
        model.to(setup.device, memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, nn.Dropout):  # so that all compute the same
                module.p = 0.0
    if options is None:
        return {name: (model, model) for name, model in models.items()}
    torch.compiler.reset()
    return {name: (model, torch.compile(model, dynamic=False, **options)) for name, model in models.items()}


def _example(setup: Setup, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=setup.device).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(1000, shape[:1], device=setup.device)


def _step(run: nn.Module, x: Tensor, target: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    optimizer.zero_grad()
    logits = run(x)
    F.cross_entropy(logits, target).backward()
    optimizer.step()
    return logits.detach()


def _infer(run: nn.Module, x: Tensor) -> Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    return run(x)


def _settle_all(models: dict[str, tuple[nn.Module, nn.Module]], x: Tensor, setup: Setup) -> None:
    """Give all forms of the library the running statistics of timm's network."""
    for name, (model, _run) in models.items():
        if name in ("no gate", "timm", "SE"):
            with setup.context():
                settle(model, x)
        else:
            model.load_state_dict(models["timm"][0].state_dict())


def build(
    what: str,
    setup: Setup,
    network: str,
    options: dict[str, Any] | None,
    shape: tuple[int, ...],
    only: Collection[str] | None = None,
) -> Work:
    """The work to time for one network.

    Args:
        what: ``training``: a step; ``inference``: a call.
        setup: Device and type.
        network: :data:`QUICK_NETWORK`, or a key of :data:`benchmarks.networks.NETWORKS`.
        options: Options of torch.compile; None: not compiled.
        shape: Shape of the images ``(N, 3, H, W)``.
        only: Names in :data:`NAMES` and :data:`OTHER_FORM` that are compiled and not timed; None for all.
    """
    training = what == "training"
    x, target = _example(setup, shape)
    models = _models(setup, network, options, what, only)
    if not training and only is None:
        _settle_all(models, x, setup)
    competitors = {}
    for name, (model, run) in models.items():
        if training:
            call = partial(_step, run, x, target, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9))
        else:
            model.eval()
            call = partial(_infer, run, x)
        competitors[name] = Competitor(call, partial(_context, name, setup, grad=training))
    agree = (tuple(name for name in ("timm", "ecanet", *OTHER_FORM) if name in competitors),)
    tolerance = (5 if training else 10) * setup.tolerance
    # A replayed CUDA graph asks the allocator for nothing, and its pool is kept and shared by all networks.
    return Work(competitors, agree, tolerance, images=shape[0], peak=options != MODES["graphs"])
