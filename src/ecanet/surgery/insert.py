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
    norm: tuple[Tensor, ...]  # the norm's tensors that take the gate's factor; empty if the gate keeps it
    runs: bool  # whether the site ran in the dry run; True if unknown


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

    A gate becomes the child ``gate`` of the module whose output it scales, and nothing else of the network changes.
    The network keeps all its keys. State dicts without the gates' keys still load, with ``strict=True``; with
    ``preserve`` loading one makes the gates 1 again. A second call with the same arguments does nothing.

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
            get the gradients they got. For that, a gate that ends in a sigmoid has the factor 2, which undoes the
            sigmoid of 0; the buffer ``scale`` in state dicts records it. GCT and GRN need no factor. False for training
            from scratch.
        fold: Fold those factors into the norms before the gates, so that the keys are those of the authors' files:
            :func:`ecanet.fold_factors_`.
        filter_fn: Function of module and name that says whether a place that ``where`` finds gets a gate: it is called
            with the residual block for ``"block"`` and ``"stage"``, otherwise with the module that the gate follows.
        optimizer: The gates' parameters are added to it, in the groups of the modules that they follow.
        input_shape: Shape of an input that the network takes. The network then runs once without data and without your
            hooks, so that channels are known for certain and the report counts multiply-adds. ``"auto"`` fits the
            network's first convolution: 1024 samples, 224 x 224 pixels or 16 frames of 112 x 112. With None, or if the
            network rejects the shape, channels are read from the layers; if that fails, an error is raised.

    Returns:
        Which gate was put where, and what it costs; prints as a table.

    Raises:
        TypeError: ``model`` is not a module, or is compiled, scripted or wrapped for parallel training; other arguments
            of a wrong type.
        ValueError: ``where`` finds nothing (the message says what can be named), another gate is there, the gate
            cannot have that many channels or cannot be neutral, the number of channels is unknown, ``input_shape``
            has no batch dimension, with ``fold`` no norm can take a factor, or the optimizer has none of the model's
            parameters. The network is then unchanged.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, for the place of the gate.

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
    new_sites, already = _sites_without_this_gate(sites, gate, kernel_size)
    if already:
        notes.append(f"{already} of these have such a gate already")
    notes += _notes_on_what_did_not_run(new_sites, run)
    registered = names_of(model)
    owner_counts = owners(model)
    rows: list[Row] = []
    with all_or_nothing(model, optimizer) as undo:
        plans = [
            _plan(model, site, gate, kernel_size, preserve, owner_counts if fold else None, run, undo)
            for site in new_sites
        ]
        if fold and len({id(plan.gate) for plan in plans}) < len(plans):
            raise ValueError(
                "fold=True needs a separate gate for every place, and gate= returned the same one for several"
            )
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
            _patch_libraries(model)
    return Report("inserted", tuple(rows), tuple(notes))


def _notes_on_what_did_not_run(sites: list[Site], run: DryRun | None) -> list[str]:
    silent = [] if run is None else [site.name for site in sites if site.host not in run.shapes]
    if run is None or not silent:
        return []
    if run.failed is not None:
        return [f"the network {run.failed}: multiply-adds are not counted"]
    if not run.saw_layers():
        return [
            f"no layer was seen to run on the input of shape {run.input_shape}, perhaps because code reads the "
            "layers' weights instead of calling them: multiply-adds are not counted, and perhaps no gate runs"
        ]
    return [f"{name} did not run on the input of shape {run.input_shape}" for name in silent]


def _patch_libraries(model: nn.Module) -> None:
    """Make libraries that rebuild networks, for training or to fill in what a file lacks, keep the gates."""
    if any(cls.__module__.startswith("ultralytics.") for cls in type(model).__mro__):
        ultralytics.keep_gates()
    transformers.keep_gates()  # if it is imported: the model may be part of one of its networks


def _sites_without_this_gate(
    sites: list[Site], gate: str | GateFactory, kernel_size: int | str
) -> tuple[list[Site], int]:
    """The sites that have no gate, and the number of those that have this gate; raises if one has another gate."""
    new_sites = []
    for site in sites:
        attached = attached_gate(site.host)
        if attached is None:
            new_sites.append(site)
            continue
        channels = getattr(attached, "channels", site.channels)
        wanted = build_gate(gate, channels, kernel_size) if channels is not None else None  # type: ignore[arg-type]
        if wanted is not None and (type(wanted), arguments_of(wanted)) != (type(attached), arguments_of(attached)):
            raise ValueError(
                f"{site.name} has a gate already, {type(attached).__name__}({arguments_of(attached)}), not "
                f"{type(wanted).__name__}({arguments_of(wanted)}): replace_gates_ swaps gates, remove_gates_ takes "
                "them out"
            )
    return new_sites, len(sites) - len(new_sites)


def _plan(
    model: nn.Module,
    site: Site,
    gate: str | GateFactory,
    kernel_size: int | Literal["adaptive"],
    preserve: bool,
    owner_counts: Counter[int] | None,
    run: DryRun | None,
    undo: Undo,
) -> _Plan:
    """Build the gate of one site, and check everything that could fail before the network is changed."""
    channels, spatial = _channels_and_spatial(site, run)
    runs = run is None or run.failed is not None or site.host in run.shapes
    module = build_fitting_gate(
        gate, kernel_size, site.name, site.host, channels, _nearest_tensor(model, site.name), undo
    )
    assert channels is not None
    _check_attachable(model, site)
    if preserve:
        try:
            make_identity_(module)
        except ValueError as error:
            raise ValueError(
                f"preserve=True cannot keep the function: {error}; take another gate, or preserve=False"
            ) from error
    norm: tuple[Tensor, ...] = ()
    if owner_counts is not None and isinstance(module, Gate) and module.factor != 1:
        if not runs:
            raise ValueError(
                f"fold=True: {site.name} did not run on the input, so it is unknown whether its gate does: "
                "call without fold"
            )
        norm = tensors_to_scale(f"the factor of the gate after {site.name}", site.host, owner_counts)
    return _Plan(site, module, channels, spatial, norm, runs)


def _channels_and_spatial(site: Site, run: DryRun | None) -> tuple[int | None, torch.Size | None]:
    """Channels and spatial size of a site's output, from the dry run or the layers; None if neither shows them.

    Raises:
        ValueError: the output is not a map with its channels in dimension 1; or the run failed, and the layers do not
            show the number of channels.
    """
    if run is None:
        return site.channels if site.certain else certain_channels(site.host), None
    channels, spatial = site.channels, None
    if site.host in run.shapes:
        shape = _shape_of_map(site, run)
        if run.failed is None:
            channels, spatial = shape[1], shape[2:]
        elif shape[1] == channels:  # the input may be a wrong one, but the layers agree with it
            spatial = shape[2:]
        elif not site.certain:
            channels = certain_channels(site.host)
    elif not site.certain:
        channels = certain_channels(site.host)
    if channels is None and run.failed is not None:
        raise ValueError(
            f"the number of channels at {site.name} ({type(site.host).__name__}) cannot be told from its layers, "
            f"and the network {run.failed}: pass input_shape=, the shape of an input that the network takes, or name "
            "a convolution or a norm"
        )
    return channels, spatial


def _shape_of_map(site: Site, run: DryRun) -> torch.Size:
    """The shape that a site returned in the dry run, checked to be ``(N, C, *spatial)``."""
    shape = run.shapes[site.host].output
    if shape is None or len(shape) < 2:
        got = "no tensor" if shape is None else f"a tensor of shape {tuple(shape)}"
        raise ValueError(f"a gate cannot follow {site.name}: it returns {got}, not a map (N, C, *spatial)")
    if site.channels is not None and _has_channels_last(site, shape):
        raise ValueError(
            f"a gate cannot follow {site.name}: its output {tuple(shape)} has its {site.channels} channels last, not "
            "in dimension 1: name a module that returns (N, C, *spatial)"
        )
    return shape


def _check_attachable(model: nn.Module, site: Site) -> None:
    """Raise ValueError if a gate cannot be attached to a site, or would be lost when layers are merged."""
    if hasattr(site.host, GATE):
        raise ValueError(
            f"a gate cannot be attached to {site.name}: {type(site.host).__name__} has its own {GATE!r}; "
            "name another module"
        )
    merging = next((n for n, module in _enclosing_modules(model, site.name) if merges_branches(module)), None)
    if merging is not None:
        raise ValueError(
            f"a gate on {site.name} would be lost when {merging or 'the network'} merges its layers for deployment "
            f"(fuse, reparameterize): {f'name {merging}' if merging else 'do that first'}"
        )


def _has_channels_last(site: Site, shape: torch.Size) -> bool:
    """Whether a site returns its channels in the last dimension.

    If the site's channels are only a guess, a square map that happens to be that wide does not count.
    """
    if len(shape) < 3 or shape[1] == site.channels or shape[-1] != site.channels:
        return False
    known = site.certain or next(site.host.children(), None) is None
    return known or len(shape) == 3 or len(set(shape[2:])) > 1


def _enclosing_modules(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that contain the named one, the innermost first: name and module."""
    while name:
        name = name.rpartition(".")[0]
        yield name, model.get_submodule(name)


def _nearest_tensor(model: nn.Module, name: str) -> Tensor | None:
    """A tensor with the type and device for a gate: the named module's, or that of the nearest module around it."""
    path = name.split(".")
    for i in range(len(path), -1, -1):
        part = model.get_submodule(".".join(path[:i]))
        for t in (*part.parameters(), *part.buffers()):
            if t.is_floating_point():
                return t
    return None
