"""The fields of a recipe: plain typed dataclasses, one for each block of the YAML file."""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ecanet.models.arguments import OPTIONS, OPTIONS_OF_INSERTION, check_arguments
from ecanet.nn import GATES
from ecanet.surgery.networks import check_network_name, classifies_pictures, is_of_a_library, known_networks
from ecanet.untrusted import check_number, shown

#: Types that an option of a network may have.
Scalar: TypeAlias = bool | int | float | str | None
#: A function by its module and name.
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
#: Strategies with which a resumed run gives identical weights and all processes end together.
_STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
#: Optimisers, with the default values of their fields.
OPTIMISERS = {"sgd": {"lr": 0.1, "weight_decay": 1e-4}, "adamw": {"lr": 1e-3, "weight_decay": 1e-2}}
#: Kinds of parameters that weight decay may leave out, and kinds of loggers.
NO_DECAY, LOGGERS = ("norms", "biases", "gates"), ("csv", "tensorboard", "wandb")
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")


@dataclass
class ModelConfig:
    """The network.

    Args:
        name: NETWORKS; torchvision/NAME or timm/NAME (``ecanet list`` prints them); or a file that ``ecanet insert
            --save`` wrote, with its gates and weights.
        gate: A gate by name (``ecanet gates`` describes them): GATES; or timm:NAME, a layer of timm's; or null for
            none.
        kernel_size: adaptive or an odd integer; in a network of ecanet also released, or a list with one for each
            stage.
        where: block, stage, conv, or names and patterns of modules, separated by commas; in a network of ecanet only
            block.
        preserve: true: gates start at 1, so that at first the outputs do not change; false: fresh gates; null: true if
            weights is set.
        weights: Weights to start from: a file, or the library's own name for them, which it downloads, or DEFAULT.
            Those of a head for other classes are left out.
        options: Further arguments of a network of ecanet, such as widths or dropout; for other networks fold and fuse,
            as in ``ecanet insert``.
        build: module:function of your own that returns a network for a number of classes, in place of name. It can be
            given only on the command line or in Python, never in a file.
    """

    name: str = "small_eca_resnet"
    gate: str | None = "eca"
    kernel_size: int | Literal["adaptive", "released"] | list[int] = "adaptive"
    where: str | list[str] = "block"
    preserve: bool | None = None
    weights: str | None = None
    options: dict[str, Scalar | list[Scalar]] = field(default_factory=dict)
    build: str | None = None

    def __post_init__(self) -> None:
        if self.gate == "none":
            self.gate = None
        if isinstance(self.where, str) and "," in self.where:
            self.where = _list_of_names(self.where, "model.where")
        chosen = {"gate": self.gate, "kernel_size": self.kernel_size, "where": self.where, "preserve": self.preserve}
        check_arguments(chosen, "model", tuple(chosen))
        if self.build is not None:
            _check_build(self.build, self.name)
        elif not self.is_own and not (is_network_name(self.name) or os.path.isfile(self.name)):
            raise ValueError(_no_such_network(self.name))
        elif is_of_a_library(self.name) and not classifies_pictures(self.name):
            raise ValueError(f"model.name={self.name} does not classify pictures; ecanet list shows which networks do")
        check_arguments(self.options, "model.options", OPTIONS[self.name] if self.is_own else OPTIONS_OF_INSERTION)
        if self.is_own:
            if self.where != "block":
                raise ValueError(f"model.where must be block in {self.name}, where every block has a gate")
            if self.preserve is False and self.weights is not None:
                raise ValueError(
                    f"model.preserve=false cannot go with model.weights in {self.name}, whose gates then start as 1"
                )
        elif not isinstance(self.kernel_size, int) and self.kernel_size != "adaptive":
            raise ValueError(
                f"model.kernel_size must be adaptive or an odd integer in a network that is not ecanet's, got "
                f"{shown(self.kernel_size)}"
            )

    @property
    def is_own(self) -> bool:
        """Whether it is a network of :mod:`ecanet.models`."""
        return self.build is None and self.name in OPTIONS


# `ecanet fit --help` reads the docstring.
for _what, _known in (("NETWORKS", OPTIONS), ("GATES", GATES)):
    ModelConfig.__doc__ = (ModelConfig.__doc__ or "").replace(_what, ", ".join(_known))


def is_network_name(name: object) -> bool:
    """Whether a name is that of a network of ecanet, torchvision or timm, and not of a file.

    Raises:
        ImportError: it is a network of timm, which is not installed.
        ValueError: the library has no such network.
    """
    if not isinstance(name, str) or (name not in OPTIONS and not is_of_a_library(name)):
        return False
    if name not in OPTIONS:
        check_network_name(name)
    return True


def _no_such_network(name: object) -> str:
    known = [*OPTIONS, *known_networks()]
    end = str(name)[:100].rpartition("/")[2]
    bare = {network: network.rpartition("/")[2].removeprefix("eca_") for network in known}
    near = difflib.get_close_matches(end, set(bare.values()), 2, 0.7)
    close = [network for near_name in near for network in known if bare[network] == near_name][:4]
    is_path = os.path.splitext(end)[1] in (".pt", ".pth", ".ckpt")
    no_file = ": there is no such file" if is_path else ", which is a folder" if os.path.isdir(str(name)) else ""
    return (
        f"model.name must be one of {', '.join(OPTIONS)}, torchvision/NAME, timm/NAME or a file of `ecanet insert "
        f"--save`, got {shown(name)!r}" + (f": did you mean {', '.join(close)}?" if close else no_file)
    )


def _check_build(build: object, name: str) -> None:
    if not isinstance(build, str) or not _FUNCTION.fullmatch(build):
        raise ValueError(f"model.build must be module:function, such as package.module:make, got {shown(build)!r}")
    if name != ModelConfig.name:
        raise ValueError(f"model.name={shown(name)!r} and model.build={build!r} are two networks: give only one")


def model_of_a_file(block: object, where: str) -> dict[str, Any]:
    """A recipe's ``model`` block from a file, with former names of fields replaced.

    Args:
        block: The block, as plain values.
        where: The file, for errors.

    Raises:
        ValueError: it has a field under both its present and its former name.
    """
    if not isinstance(block, dict) or "neutral" not in block:
        return block  # type: ignore[return-value]
    if "preserve" in block:
        raise ValueError(f"{where}: model has both preserve and neutral, which is its former name")
    # When preserve was called neutral, false had the meaning that null has now.
    return {("preserve" if k == "neutral" else k): (v or None if k == "neutral" else v) for k, v in block.items()}


#: Sources whose pictures are files, or rows of files, and a description of their root.
FILE_SOURCES = {
    "image_folder": "the folder that holds train/ and val/, or the classes",
    "csv": "the CSV file",
    "hf": "the folder of the Arrow or Parquet files, or one of them",
}
_FILES = tuple(FILE_SOURCES)
#: The sources that use an option; options that are not here are used by all sources.
SOURCES_OF = {
    "download": ("fashion_mnist",),
    **dict.fromkeys(("verify", "resize", "val_root", "val_fraction", "split_seed"), _FILES),
    **dict.fromkeys(("image_column", "label_column"), ("csv", "hf")),
    "label_separator": ("csv",),
}
_SOURCES = ("embedded", "fashion_mnist", *_FILES)
_SEPARATORS = ("pipe", "semicolon", "comma", "space", "none")


@dataclass
class DataConfig:
    """The pictures. docs/data.md has the details.

    Args:
        source: embedded (10,000 pictures of Fashion-MNIST in the package), fashion_mnist (the four original files),
            image_folder (root/train/CLASS/* and root/val/CLASS/*, where val may also be called validation, valid or
            test; or root/CLASS/* with val_fraction or val_root), csv (a file with the columns file and label) or hf
            (what Hugging Face's datasets saved on disk, or Parquet files). If the command line has only --data.root,
            without a recipe, the source is image_folder, or csv for a .csv file.
        root: Folder of the data, or the CSV file; for fashion_mnist by default the folder of Debian's package
            dataset-fashion-mnist.
        val_root: Where the validation pictures are, if not in root: a folder of the classes, a CSV file, or a folder of
            Arrow or Parquet files.
        val_fraction: Share of the training pictures of each class that is used for validation instead, such as 0.1.
        split_seed: Seed of this split, independent of the seed of the trainer.
        image_column: Column of the pictures, for csv and hf; by default found by its name or type.
        label_column: Column of the labels, for csv and hf; by default found by its name or type.
        label_separator: Separator of several labels in a cell of a CSV file: pipe, semicolon, comma, space, or none if
            a cell always has one label.
        download: Let torchvision download Fashion-MNIST into root.
        verify: Decode every picture before training, and list all that cannot be read; by default if there are 20,000
            or fewer.
        image_size: Height and width of the network's input, in pixels; by default 28 for Fashion-MNIST, 224 for others.
        resize: Shorter side to which validation images are resized before the centre crop, for sources of files; by
            default 256/224 of image_size.
        augment: crop (pad by an eighth, crop, flip), resized_crop (scale and aspect ratio, flip), none, or auto: crop
            for Fashion-MNIST, resized_crop for others.
        randaugment: Magnitude of torchvision's RandAugment, which then applies two operations to each image: 0 to 30, 9
            is usual; null is off.
        color_jitter: Brightness, contrast and saturation are then multiplied by random factors from 1 - color_jitter to
            1 + color_jitter; 0 is off.
        batch_size: Images in a batch of each process.
        workers: Number of processes that load data, for each training process.
    """

    source: Literal["embedded", "fashion_mnist", "image_folder", "csv", "hf"] = "embedded"
    root: Path | None = None
    val_root: Path | None = None
    val_fraction: float | None = None
    split_seed: int = 0
    image_column: str | None = None
    label_column: str | None = None
    label_separator: Literal["pipe", "semicolon", "comma", "space", "none"] = "pipe"
    download: bool = False
    verify: bool | None = None
    image_size: int | None = None
    resize: int | None = None
    augment: Literal["auto", "crop", "resized_crop", "none"] = "auto"
    randaugment: int | None = None
    color_jitter: float = 0.0
    batch_size: int = 128
    workers: int = 0

    @property
    def has_files(self) -> bool:
        """Whether the pictures are files of any size, not those of Fashion-MNIST."""
        return self.source in FILE_SOURCES

    def __post_init__(self) -> None:
        _check_ranges(self, "data", batch_size=(1, 2**20), workers=(0, 1024), image_size=(1, 4096), resize=(1, 2**13))
        _check_ranges(self, "data", val_fraction=(0, 1), split_seed=(0, 2**63 - 1))
        _check_ranges(self, "data", randaugment=(0, 30), color_jitter=(0, 1))
        self._check_names()
        if self.has_files and self.root is None:
            raise ValueError(f"data.root must name {FILE_SOURCES[self.source]}, got null")
        if self.source == "embedded" and self.root is not None:
            raise ValueError(
                f"data.root={str(self.root)!r} is not used by data.source=embedded: "
                "set data.source to image_folder, csv, hf or fashion_mnist"
            )
        if self.val_fraction in (0, 1):
            raise ValueError(f"data.val_fraction must be between 0 and 1, such as 0.1, got {self.val_fraction}")
        if self.val_fraction is not None and self.val_root is not None:
            raise ValueError(
                f"data.val_fraction={self.val_fraction} and data.val_root={str(self.val_root)!r} both choose the "
                "validation pictures: leave one out"
            )
        if self.resize is not None and self.resize < (self.image_size or 224):
            raise ValueError(
                f"data.resize={self.resize} must not be below data.image_size={self.image_size or 224}: "
                "the centre crop would be padded with black"
            )

    def _check_names(self) -> None:
        """Raise for an unknown source or separator, and for an option that the source does not use."""
        for name, known in (("source", _SOURCES), ("label_separator", _SEPARATORS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"data.{name} must be one of {', '.join(known)}, got {shown(value)!r}")
        for name in ("image_column", "label_column"):
            if (value := getattr(self, name)) is not None and not isinstance(value, str):
                raise TypeError(f"data.{name} must be the name of a column, got {shown(value)}")
        if isinstance(self.split_seed, float):
            raise TypeError(f"data.split_seed must be a whole number, got {self.split_seed}")
        for name, sources in SOURCES_OF.items():
            value = getattr(self, name)
            if value and value != getattr(DataConfig, name) and self.source not in sources:
                raise ValueError(
                    f"data.{name} is for data.source={' or '.join(sources)}, got data.source={self.source}"
                )


@dataclass
class OptimConfig:
    """The optimiser, its schedule and its regularisation.

    Args:
        epochs: Passes over the training images.
        name: sgd (with momentum) or adamw.
        lr: Highest learning rate; by default 0.1, or 0.001 for adamw. ``ecanet fit --find-lr`` suggests one.
        momentum: Momentum; for adamw its first beta (the second is 0.999).
        nesterov: Whether momentum is Nesterov's.
        weight_decay: L2 penalty on every parameter, as in the paper's recipes, by default 1e-4; for adamw decoupled
            weight decay, by default 0.01.
        no_decay: Parameters without weight decay: norms, biases, gates, or several of them, separated by commas.
        freeze: Modules and parameters that are not trained, by name or pattern, separated by commas: conv1,layer1.* or
            '*,!fc', where ! means that the names after it are trained. Frozen norms keep their statistics, too.
        gate_lr_scale: The gates' learning rate is lr times this.
        accumulate: Batches in a step. The gradient of a step is the mean over the images of its batches.
        schedule: step (times gamma every step_epochs), exponential (times gamma every epoch), cosine (to 0), constant.
        step_epochs: Epochs between two steps of the schedule step.
        gamma: Factor of the learning rate, for step and exponential.
        warmup_epochs: Epochs of linear increase at the start; may be a fraction. If it is not below epochs, a third of
            epochs is used.
        early_stopping: Stop after this many epochs in a row in which validation top-1 or mAP does not exceed its best;
            null is off.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off. If mixup and cutmix are both on, each batch gets one of them at random.
        clip_norm: Largest norm of the gradient; null is off.
        ema: Decay of an exponential moving average of the weights, which is then validated and saved; null is off.
    """

    epochs: int = 10
    name: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float | None = None
    no_decay: list[str] | str = field(default_factory=list)
    freeze: list[str] | str = field(default_factory=list)
    gate_lr_scale: float = 1.0
    accumulate: int = 1
    schedule: Literal["step", "exponential", "cosine", "constant"] = "cosine"
    step_epochs: int = 30
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    early_stopping: int | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    clip_norm: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OPTIMISERS:
            raise ValueError(f"optim.name must be one of {', '.join(OPTIMISERS)}, got {shown(self.name)!r}")
        _check_ranges(
            self,
            "optim",
            epochs=(1, 10**6),
            lr=(0, 1e38),
            momentum=(0, 1),
            weight_decay=(0, 1e6),
            gate_lr_scale=(0, 1e6),
            accumulate=(1, 2**20),
            step_epochs=(1, 10**6),
            gamma=(0, 1e6),
            warmup_epochs=(0, 1e6),
            early_stopping=(1, 10**6),
            mixup=(0, 1e3),
            cutmix=(0, 1e3),
            clip_norm=(0, 1e12),
        )
        self.no_decay = _list_of_names(self.no_decay, "optim.no_decay", NO_DECAY)
        self.freeze = _list_of_names(self.freeze, "optim.freeze")
        if self.clip_norm == 0:
            raise ValueError("optim.clip_norm must be above 0 or null, got 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"optim.label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"optim.ema must be between 0 and 1, such as 0.999, or null, got {self.ema}")
        self._check_momentum()

    def _check_momentum(self) -> None:
        if self.nesterov and self.name != "sgd":
            raise ValueError(f"optim.nesterov is for optim.name=sgd, got optim.name={self.name}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov needs a momentum above 0, got optim.momentum=0")
        if self.name == "adamw" and self.momentum == 1:
            raise ValueError("optim.momentum must be below 1 for optim.name=adamw, whose first beta it is, got 1")

    @property
    def rate(self) -> float:
        """``lr``, or the optimiser's default."""
        return OPTIMISERS[self.name]["lr"] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        """``weight_decay``, or the optimiser's default."""
        return OPTIMISERS[self.name]["weight_decay"] if self.weight_decay is None else self.weight_decay

    @property
    def warmup(self) -> float:
        """Epochs of warm-up: ``warmup_epochs``, or a third of ``epochs`` if it is not below ``epochs``."""
        return self.warmup_epochs if self.warmup_epochs < self.epochs else self.epochs / 3


@dataclass
class TrainerConfig:
    """The machine and the precision: arguments of Lightning's Trainer.

    Args:
        seed: Seed of the weights, the order of the images, augmentation, dropout and mixup.
        accelerator: auto, cpu, gpu, mps.
        devices: Number of devices, or auto.
        nodes: Number of machines.
        strategy: auto, ddp, ddp_find_unused_parameters_true or ddp_find_unused_parameters_false; with the last one and
            more than two processes, a resumed run does not reach identical weights.
        precision: 32-true, bf16-mixed, 16-mixed, 64-true, ...
        channels_last: Whether images and convolutions are in channels-last memory format.
        compile: Compile the network (torch.compile): the first step is slow, later ones are faster.
        checkpoint_steps: Within an epoch, also write last.ckpt after every this many steps; null: only at the end of
            the epoch.
        log_steps: Log the training loss after every this many steps.
        loggers: csv, tensorboard, wandb (pip install 'ecanet[wandb]'; WANDB_MODE=offline needs no account), or several
            of them, separated by commas; [] for none.
    """

    seed: int = 0
    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    channels_last: bool = False
    compile: bool = False
    checkpoint_steps: int | None = None
    log_steps: int = 50
    loggers: list[str] | str = field(default_factory=lambda: ["csv", "tensorboard"])

    def __post_init__(self) -> None:
        _check_ranges(
            self, "trainer", seed=(0, 2**32 - 1), nodes=(1, 10**4), log_steps=(1, 10**9), checkpoint_steps=(1, 10**9)
        )
        self.loggers = _list_of_names(self.loggers, "trainer.loggers", LOGGERS)
        if self.devices != "auto":
            _check_ranges(self, "trainer", devices=(-1, 1024))
        if self.accelerator not in _ACCELERATORS:
            raise ValueError(
                f"trainer.accelerator must be one of {', '.join(_ACCELERATORS)}, got {shown(self.accelerator)!r}"
            )
        if self.strategy not in _STRATEGIES:
            why = (
                "it splits weights among processes, which small networks do not need, and its checkpoints are partial"
                if self.strategy.startswith(("fsdp", "deepspeed", "model_parallel"))
                else "with it, not all processes end, save and resume together"
            )
            raise ValueError(
                f"trainer.strategy must be one of {', '.join(_STRATEGIES)}, got {shown(self.strategy)!r}: {why}; "
                "ddp trains on several devices or machines"
            )


@dataclass
class Recipe:
    """Everything that determines the result of a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def to_plain(value: Any) -> Any:
    """Convert dataclasses and paths to dicts, lists and strings, which JSON, YAML and a safe checkpoint can hold."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: to_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    return value


def _list_of_names(value: object, what: str, known: Sequence[str] = ()) -> list[str]:
    """Names from a list, or from a text in which commas separate them; each name appears once.

    Raises:
        TypeError: the value is neither.
        ValueError: a name is empty or unknown.
    """
    names = value
    if isinstance(value, str):
        names = [name.strip() for name in value.split(",")] if value.strip() else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} must be names separated by commas, or a list of names, got {shown(value)}")
    for name in names:
        if not name or (known and name not in known):
            wanted = f"some of {', '.join(known)}" if known else "names or patterns such as layer1.*"
            raise ValueError(f"{what} must be {wanted}, got {shown(name)!r}")
    return list(dict.fromkeys(names))


def with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """Complete a recipe of an earlier version, as plain values, with the defaults of the fields that it lacks."""
    recipe = {**recipe, "model": model_of_a_file(recipe["model"], "the recipe")}
    return {block: {**values, **recipe[block]} for block, values in to_plain(Recipe()).items()}


def _check_ranges(config: Any, block: str, **ranges: tuple[float, float]) -> None:
    """Raise unless each of these fields is a finite number within its limits, or None."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None:
            check_number(value, f"{block}.{name}", low, high)
