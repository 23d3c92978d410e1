"""Put gates into a network that somebody else wrote."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ecanet.networks.checks import check_input_shape, check_model
from ecanet.nn import Gate
from ecanet.nn.absent_gates import keep_loading_
from ecanet.nn.attached import GATE, attach_, attached_gate
from ecanet.nn.build import GateFactory, build_gate
from ecanet.nn.folding import fold_, owners, tensors_to_scale
from ecanet.nn.keep import transformers, ultralytics
from ecanet.nn.neutral import make_identity_
from ecanet.nn.undo import Undo, all_or_nothing
from ecanet.surgery.find.dry_run import DryRun, dry_run
from ecanet.surgery.find.layers import certain_channels, merges_branches, names_of
from ecanet.surgery.find.sites import FilterFn, Site, Where, find_sites
from ecanet.surgery.fitting import arguments_of, build_fitting_gate
from ecanet.surgery.optimizers import add_parameters_, check_optimizer
from ecanet.surgery.report import Report, Row, gate_row


class _Plan(NamedTuple):
    site: Site
    gate: nn.Module
    channels: int
    spatial: torch.Size | None
    norm: tuple[Tensor, ...]  # what takes the gate's factor; nothing if the gate keeps it
    runs: bool  # in the dry run, or for all that is known


def insert_gates_(
    model: nn.Module,
    gate: str | GateFactory = "eca",
    where: Where = "block",
    *,
    kernel_size: int | Literal["adaptive"] = "adaptive",
    preserve: bool = True,
    fold: bool = False,
    filter_fn: FilterFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    input_shape: Sequence[int] | Literal["auto"] | None = "auto",
) -> Report:
    """Put a gate after every residual branch (or elsewhere) of a network, in place, without changing its function.

    A gate becomes the child ``gate`` of the module whose output it scales, and nothing else of the network is touched.
    All keys the network had stay, and state dicts of those keys load as before, strictly; with ``preserve`` they make
    the gates 1 again. A second call with the same arguments does nothing.

    Args:
        model: Any network of convolutions: torchvision's, timm's, segmentation_models.pytorch's, YOLO's, your own. On
            any device, ``"meta"`` included.
        gate: A name in :data:`ecanet.nn.GATES`, or a class or function of the number of channels.
        where: ``"block"``: at the end of every residual branch, after its last norm and before the addition, as in the
            paper; in inverted residuals after the linear projection's norm. ``"stage"``: after the last block of every
            stage. ``"conv"``: after every convolution with norm and activation, for networks without residuals (VGG,
            U-Net) and YOLO. Or the name of a module, a pattern such as ``"layer4.*.bn3"``, or several of them: after
            those modules. Or a function of module and name.
        kernel_size: For gates that have one; ``"adaptive"`` is Eq. (12).
        preserve: Start with gates that are 1: the network computes the same function right after, and its parameters
            get the gradients they got. Such a gate has the factor 2, which undoes the sigmoid of 0, and a buffer
            ``scale`` in state dicts that says so. False for training from scratch.
        fold: Fold those factors into the norms before the gates, so that the keys are those of the authors' files:
            :func:`ecanet.fold_factors_`.
        filter_fn: Function of module and name that says which of what ``where`` finds are to get one: it is asked for
            the residual blocks with ``"block"`` and ``"stage"``, otherwise for the modules that gates follow.
        optimizer: Gets the gates' parameters, in the groups of the modules that they follow.
        input_shape: Of an input that the network takes. It then runs once without data, and without hooks of others, so
            that channels are known for certain and the report counts multiply-adds. ``"auto"`` fits the network's first
            convolution: 1024 samples, 224 x 224 pixels or 16 frames of 112 x 112. None, or a network that does not take
            it: layers tell where they can, and where they cannot it is an error.

    Returns:
        What was put where, and what it costs; prints as a table.

    Raises:
        TypeError: ``model`` is no module, or is compiled, scripted or wrapped for parallel training; other arguments
            of a wrong type.
        ValueError: nothing is found for ``where`` (the message says what can be named), another gate is there, the
            gate cannot have that many channels or cannot be neutral, nothing tells how many channels there are,
            ``input_shape`` is one sample's, with ``fold`` there is no norm that could take a
            factor, the optimizer has none of the model's parameters. The network is then as it was.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, for the place.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18().eval()
        >>> x = torch.randn(1, 3, 64, 64)
        >>> before = model(x)
        >>> report = insert_gates_(model, where="block")
        >>> len(report.rows), report.parameters
        (8, 36)
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
    """
    check_model(model)
    check_optimizer(optimizer, model)
    if input_shape is not None and input_shape != "auto":
        check_input_shape(input_shape)
    for argument, value in (("preserve", preserve), ("fold", fold)):
        if not isinstance(value, bool):
            raise TypeError(f"{argument} must be True or False, got {value!r}")
    run = dry_run(model, input_shape)
    sites, notes = find_sites(model, where, filter_fn, run)
    todo, already = _not_yet(sites, gate, kernel_size)
    if already:
        notes.append(f"{already} of these have such a gate already")
    if run is not None:
        silent = [site.name for site in todo if site.host not in run.shapes]
        if run.failed is not None and silent:
            notes.append(f"the network {run.failed}: multiply-adds are not counted")
        elif silent and not run.saw_layers():
            notes.append(
                f"no layer was seen to run on the input of shape {run.input_shape}, as where code reads their weights "
                "instead of calling them: multiply-adds are not counted, and no gate may run"
            )
        else:
            notes += [f"{name} did not run on the input of shape {run.input_shape}" for name in silent]
    registered = names_of(model)
    count = owners(model)
    rows: list[Row] = []
    with all_or_nothing(model, optimizer) as undo:
        plans = [_plan(model, site, gate, kernel_size, preserve, count if fold else None, run, undo) for site in todo]
        if fold and len({id(plan.gate) for plan in plans}) < len(plans):
            raise ValueError("fold=True needs a gate of its own for every place, and gate= gave one to several")
        for site, module, channels, spatial, _, runs in plans:
            row = gate_row(f"{site.name}.{GATE}", module, site.name, channels, spatial)
            costs = runs or (run is not None and not run.saw_layers())
            rows.append(row if costs else row._replace(multiply_adds=0))
            if len(registered[site.host]) > 1:
                notes.append(f"{site.name} is shared, and its gate with it: {', '.join(registered[site.host])}")
        for site, module, _, _, norm, _ in plans:
            if norm:
                assert isinstance(module, Gate)
                undo.keep(norm)
                fold_(module, norm)
            attach_(site.host, module)
            add_parameters_(optimizer, module, f"{site.name}.{GATE}", site.host)
        if plans:
            keep_loading_(model)
            _tell_the_library_of(model)
    return Report("inserted", tuple(rows), tuple(notes))


def _tell_the_library_of(model: nn.Module) -> None:
    """Let those know of gates who build networks anew to train them, or fill in what a file lacks."""
    if any(cls.__module__.startswith("ultralytics.") for cls in type(model).__mro__):
        ultralytics.keep_gates()
    transformers.keep_gates()  # where it is imported: the model may be a part of one of its networks


def _not_yet(sites: list[Site], gate: str | GateFactory, kernel_size: int | str) -> tuple[list[Site], int]:
    todo = []
    for site in sites:
        there = attached_gate(site.host)
        if there is None:
            todo.append(site)
            continue
        channels = getattr(there, "channels", site.channels)
        wanted = build_gate(gate, channels, kernel_size) if channels is not None else None  # type: ignore[arg-type]
        if wanted is not None and (type(wanted), arguments_of(wanted)) != (type(there), arguments_of(there)):
            raise ValueError(
                f"{site.name} has a gate already, {type(there).__name__}({arguments_of(there)}), and not "
                f"{type(wanted).__name__}({arguments_of(wanted)}): replace_gates_ swaps gates, remove_gates_ takes "
                "them out"
            )
    return todo, len(sites) - len(todo)


def _plan(
    model: nn.Module,
    site: Site,
    gate: str | GateFactory,
    kernel_size: int | Literal["adaptive"],
    preserve: bool,
    count: Counter[int] | None,
    run: DryRun | None,
    undo: Undo,
) -> _Plan:
    """Build the gate of one site and see that everything can be done, before anything is."""
    channels, spatial = site.channels, None
    seen = run is not None and site.host in run.shapes
    runs = seen or run is None or run.failed is not None
    if run is not None and seen:
        shape = run.shapes[site.host].output
        if shape is None or len(shape) < 2:
            got = "no tensor" if shape is None else f"a tensor of shape {tuple(shape)}"
            raise ValueError(f"a gate cannot follow {site.name}: it returns {got}, and not a map (N, C, *spatial)")
        if channels is not None and _has_channels_last(site, shape):
            raise ValueError(
                f"a gate cannot follow {site.name}: its output {tuple(shape)} has its {channels} channels last, and "
                "not in dimension 1: name a module that returns (N, C, *spatial)"
            )
        if run.failed is None:
            channels, spatial = shape[1], shape[2:]
        elif shape[1] == channels:  # an input that may be wrong, and layers, say the same
            spatial = shape[2:]
        else:
            channels = channels if site.certain else certain_channels(site.host)
    elif not site.certain:
        channels = certain_channels(site.host)
    if channels is None and run is not None and run.failed is not None:
        raise ValueError(
            f"how many channels there are at {site.name} ({type(site.host).__name__}) cannot be told from its layers, "
            f"and the network {run.failed}: pass input_shape=, the shape of an input that the network takes, or name "
            "a convolution or a norm"
        )
    module = build_fitting_gate(gate, kernel_size, site.name, site.host, channels, _example(model, site.name), undo)
    assert channels is not None
    if hasattr(site.host, GATE):
        raise ValueError(
            f"a gate cannot be attached to {site.name}: {type(site.host).__name__} has its own {GATE!r}; "
            "name another module"
        )
    merging = next((n for n, owner in _owners(model, site.name) if merges_branches(owner)), None)
    if merging is not None:
        raise ValueError(
            f"a gate on {site.name} would be lost when {merging or 'the network'} merges its layers for deployment "
            f"(fuse, reparameterize): {f'name {merging}' if merging else 'do that first'}"
        )
    if preserve:
        try:
            make_identity_(module)
        except ValueError as error:
            raise ValueError(
                f"preserve=True cannot keep the function: {error}; take another gate, or preserve=False"
            ) from error
    norm: tuple[Tensor, ...] = ()
    if count is not None and isinstance(module, Gate) and module.factor != 1:
        if not runs:
            raise ValueError(
                f"fold=True: {site.name} did not run on the input, so nothing tells whether its gate does: leave fold "
                "out"
            )
        norm = tensors_to_scale(f"the factor of the gate after {site.name}", site.host, count)
    return _Plan(site, module, channels, spatial, norm, runs)


def _has_channels_last(site: Site, shape: torch.Size) -> bool:
    """Whether a module with as many channels as a site's returns them in the last dimension.

    Where layers only hint at the channels, a square map that happens to be as wide keeps its gate.
    """
    if len(shape) < 3 or shape[1] == site.channels or shape[-1] != site.channels:
        return False
    known = site.certain or next(site.host.children(), None) is None
    return known or len(shape) == 3 or len(set(shape[2:])) > 1


def _owners(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Name of each module that the named one is inside of, the innermost first, and the module."""
    while name:
        name = name.rpartition(".")[0]
        yield name, model.get_submodule(name)


def _example(model: nn.Module, name: str) -> Tensor | None:
    """A tensor of the type and on the device of what a gate follows: the module's own, or of the part around it."""
    path = name.split(".")
    for i in range(len(path), -1, -1):
        part = model.get_submodule(".".join(path[:i]))
        for t in (*part.parameters(), *part.buffers()):
            if t.is_floating_point():
                return t
    return None
