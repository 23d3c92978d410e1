"""The networks as timm models: ``timm.create_model("eca_resnet50.ecanet")``.

Importing this module registers them; :mod:`ecanet.models` does so if timm is installed.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from ecanet.models.hub import HubModel
from ecanet.models.mobilenetv2 import ECAMobileNetV2
from ecanet.models.plain import PlainWeights, load_plain_weights
from ecanet.models.resnet import ECAResNet
from ecanet.nn.build import GateSpec


class _TimmModel(HubModel):
    """timm's interface to a network of this library.

    Attributes:
        num_features: Channels of the last feature map.
        feature_info: Channels, reduction and module of each of the five feature maps that ``features_only`` offers.
        head_hidden_size: Inputs of the classifier.
    """

    num_features: int
    feature_info: list[dict[str, Any]]

    def _sections(self) -> list[list[nn.Module]]:
        """The modules in order, grouped by feature map: those up to the first map, those from it to the second, etc."""
        raise NotImplementedError

    def _head_drop(self) -> nn.Module:
        raise NotImplementedError

    def _set_classifier(self, classifier: nn.Module) -> None:
        raise NotImplementedError

    def _run_section(self, index: int, x: Tensor) -> Tensor:
        for module in self._sections()[index]:
            if self.grad_checkpointing and index > 0:  # block by block; the stem would save too little
                x = checkpoint_seq(module if type(module) is nn.Sequential else [module], x)
            else:
                x = module(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """The feature map before pooling: ``(N, in_chans, H, W)`` to ``(N, num_features, H / 32, W / 32)``."""
        for index in range(len(self._sections())):
            x = self._run_section(index, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify.

        Args:
            x: What :meth:`forward_features` returns.
            pre_logits: Stop before the classifier.
        """
        x = self._head_drop()(self.global_pool(x))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_chans, H, W)`` to ``(N, num_classes)``, or to pooled features if ``num_classes`` is 0."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Intermediate feature maps, the finest first.

        Args:
            x: ``(N, in_chans, H, W)``.
            indices: Which of the five maps: their indices, an integer n for the last n, or None for all.
            norm: Has no effect, because these networks have no final norm.
            stop_early: Compute nothing after the last requested map.
            output_fmt: Must be ``"NCHW"``.
            intermediates_only: Return the maps without the output of :meth:`forward_features`.

        Raises:
            ValueError: another ``output_fmt``, or ``indices`` out of range.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted = self._feature_indices(indices)
        intermediates = []
        for index in range(max(wanted) + 1 if stop_early or intermediates_only else len(self._sections())):
            x = self._run_section(index, x)
            if index in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def _feature_indices(self, indices: int | Sequence[int] | None) -> set[int]:
        maps = len(self.feature_info)
        if indices is None:
            indices = maps
        if isinstance(indices, int):
            indices = range(-indices, 0)
        if not indices or not all(-maps <= index < maps for index in indices):
            raise ValueError(f"indices must name some of the {maps} feature maps, 0 to {maps - 1}, got {indices!r}")
        return {index % maps for index in indices}

    def get_classifier(self, name_only: bool = False) -> Any:
        """The classifier, or its name."""
        return self.classifier_name if name_only else self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: Outputs of the classifier; 0 for no classifier, so that the network returns features.
            global_pool: timm's name of a pooling; None keeps the present one, ``""`` is no pooling.
        """
        if global_pool is None:
            global_pool = self.config["global_pool"]
        like = next(self.parameters())
        self.global_pool, classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self._set_classifier(classifier.to(like.device, like.dtype))
        self.global_pool.train(self.training)
        classifier.train(self.training)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.config = {**self.config, "num_classes": num_classes, "global_pool": global_pool}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations inside blocks in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable


def _gate_or_none(gate: GateSpec) -> GateSpec:
    return None if isinstance(gate, str) and gate == "none" else gate


def _set_in_chans_(stem: nn.Module, in_chans: int) -> None:
    assert isinstance(stem, nn.Conv2d)
    if in_chans == stem.in_channels:
        return
    stem.in_channels = in_chans
    stem.weight = nn.Parameter(stem.weight.new_empty(stem.out_channels, in_chans, *stem.kernel_size))
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")


class TimmECAResNet(_TimmModel, ECAResNet):
    """:class:`~ecanet.models.ECAResNet` with timm's interface and the same keys.

    Args:
        depth: As in :class:`~ecanet.models.ECAResNet`.
        gate: Likewise; ``"none"`` also means no gate, because ``timm.create_model`` drops arguments that are None.
        num_classes: Outputs of the classifier; 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: timm's name of a pooling.
        drop_rate: Dropout before the classifier.
        output_stride: 32; for depth 50 or more also 16 or 8, by dilation.
        weights: A plain network's weights, loaded without changing the function that it computes.
        kwargs: ``kernel_size`` and the other arguments of :class:`~ecanet.models.ECAResNet`.

    Raises:
        TypeError, ValueError: as :class:`~ecanet.models.ECAResNet` and :func:`~ecanet.models.load_plain_weights`; also
            if the network cannot have that ``output_stride``.

    Example:
        >>> import timm, torch
        >>> backbone = timm.create_model("eca_resnet50.ecanet", features_only=True, out_indices=(1, 4))
        >>> [tuple(x.shape) for x in backbone(torch.randn(1, 3, 64, 64))]
        [(1, 256, 16, 16), (1, 2048, 2, 2)]
    """

    _dilations: ClassVar = {32: [False, False, False], 16: [False, False, True], 8: [False, True, True]}

    def __init__(
        self,
        depth: int = 50,
        gate: GateSpec = "eca",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        output_stride: int = 32,
        weights: PlainWeights | None = None,
        **kwargs: Any,
    ) -> None:
        if output_stride not in self._dilations:
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")
        if output_stride != 32 and depth < 50:
            raise ValueError(
                f"output_stride must be 32 for depth {depth}, got {output_stride}: torchvision dilates only "
                "bottleneck blocks, so use eca_resnet50 or deeper"
            )
        super().__init__(
            depth,
            _gate_or_none(gate),
            num_classes=max(1, num_classes),
            replace_stride_with_dilation=self._dilations[output_stride],
            **kwargs,
        )
        del self.config["replace_stride_with_dilation"]
        self.config |= {"in_chans": in_chans, "drop_rate": drop_rate, "output_stride": output_stride}
        del self.avgpool
        self.num_features = 512 * self._layouts[depth][0].expansion
        self.feature_info = [
            {"num_chs": channels, "reduction": min(reduction, output_stride), "module": module}
            for channels, reduction, module in [
                (self.conv1.out_channels, 2, "relu"),
                (self.num_features // 8, 4, "layer1"),
                (self.num_features // 4, 8, "layer2"),
                (self.num_features // 2, 16, "layer3"),
                (self.num_features, 32, "layer4"),
            ]
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.grad_checkpointing = False
        _set_in_chans_(self.conv1, in_chans)
        self.reset_classifier(num_classes, global_pool)
        if weights is not None:
            load_plain_weights(self, weights, fold=self.config["fold"])

    def _sections(self) -> list[list[nn.Module]]:
        stem = [self.conv1, self.bn1, self.relu]
        return [stem, [self.maxpool, self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def _head_drop(self) -> nn.Module:
        return self.head_drop

    def _set_classifier(self, classifier: nn.Module) -> None:
        self.fc = classifier


class TimmECAMobileNetV2(_TimmModel, ECAMobileNetV2):
    """:class:`~ecanet.models.ECAMobileNetV2` with timm's interface and the same keys.

    Args:
        gate: As in :class:`~ecanet.models.ECAMobileNetV2`; ``"none"`` also means no gate, because
            ``timm.create_model`` drops arguments that are None.
        num_classes: Outputs of the classifier; 0 for no classifier.
        in_chans: Channels of the images.
        global_pool: timm's name of a pooling.
        drop_rate: Dropout before the classifier.
        weights: A plain network's weights, loaded without changing the function that it computes.
        kwargs: ``kernel_size``, ``width_mult``, ``neutral``, ``factor``, ``fold`` and ``norm_layer``, as in that class.

    Raises:
        TypeError, ValueError: as :class:`~ecanet.models.ECAMobileNetV2` and
            :func:`~ecanet.models.load_plain_weights`.

    Example:
        >>> import timm, torch
        >>> timm.create_model("eca_mobilenet_v2", num_classes=0, in_chans=1)(torch.randn(1, 1, 64, 64)).shape
        torch.Size([1, 1280])
    """

    #: Index in ``features`` of the last block of each resolution.
    _map_ends: ClassVar = (1, 3, 6, 13, 17)

    def __init__(
        self,
        gate: GateSpec = "eca",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.2,
        weights: PlainWeights | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(_gate_or_none(gate), num_classes=max(1, num_classes), dropout=drop_rate, **kwargs)
        del self.config["dropout"]
        self.config |= {"in_chans": in_chans, "drop_rate": drop_rate}
        self.num_features = self.last_channel
        self.feature_info = [
            {"num_chs": block.out_channels, "reduction": 2 ** (i + 1), "module": f"features.{end}"}
            for i, (end, block) in enumerate((end, self.features[end]) for end in self._map_ends)
        ]
        self.grad_checkpointing = False
        _set_in_chans_(self.get_submodule("features.0.0"), in_chans)
        self.reset_classifier(num_classes, global_pool)
        if weights is not None:
            load_plain_weights(self, weights, fold=self.config["fold"])

    def _sections(self) -> list[list[nn.Module]]:
        starts = (0, *(end + 1 for end in self._map_ends))
        ends = (*starts[1:], len(self.features))
        return [list(self.features[start:end]) for start, end in zip(starts, ends, strict=True)]

    def _head_drop(self) -> nn.Module:
        return self.classifier[0]

    def _set_classifier(self, classifier: nn.Module) -> None:
        if isinstance(classifier, nn.Linear):
            nn.init.normal_(classifier.weight, 0, 0.01)  # as in torchvision
            nn.init.zeros_(classifier.bias)
        self.classifier[1] = classifier


def _pretrained_cfg(first_conv: str, classifier: str) -> dict[str, Any] | PretrainedCfg:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "origin_url": "https://github.com/BangguWu/ECANet",
        "paper_ids": "arXiv:1910.03151",
    }


#: timm's registry reads this name. No entry has a URL, because no weights are hosted.
default_cfgs = generate_default_cfgs(
    {f"eca_resnet{depth}.ecanet": _pretrained_cfg("conv1", "fc") for depth in (18, 34, 50, 101, 152)}
    | {"eca_mobilenet_v2.ecanet": _pretrained_cfg("features.0.0", "classifier.1")}
)


def _create(model_class: type[_TimmModel], variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if pretrained:
        source = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not source.has_weights and not source.state_dict:
            raise ValueError(
                f"pretrained=True finds no weights for {variant}, because none are hosted. Use pretrained=False with "
                "weights= a plain network's weights such as 'IMAGENET1K_V1', or pass the authors' file with "
                "kernel_size='released' and pretrained_cfg_overlay={'file': path}, or to ecanet.models.load_official"
            )
    # MobileNetV2's feature maps are inside its sequence "features", the ResNets' are at modules of the network itself.
    feature_cfg = {"flatten_sequential": model_class is TimmECAMobileNetV2}
    return build_model_with_cfg(model_class, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def eca_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ECA-ResNet-18 for timm: see :class:`TimmECAResNet`."""
    return _create(TimmECAResNet, "eca_resnet18", pretrained, {"depth": 18, **kwargs})


@register_model
def eca_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ECA-ResNet-34 for timm: see :class:`TimmECAResNet`."""
    return _create(TimmECAResNet, "eca_resnet34", pretrained, {"depth": 34, **kwargs})


@register_model
def eca_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ECA-ResNet-50 for timm: see :class:`TimmECAResNet`."""
    return _create(TimmECAResNet, "eca_resnet50", pretrained, {"depth": 50, **kwargs})


@register_model
def eca_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ECA-ResNet-101 for timm: see :class:`TimmECAResNet`."""
    return _create(TimmECAResNet, "eca_resnet101", pretrained, {"depth": 101, **kwargs})


@register_model
def eca_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ECA-ResNet-152 for timm: see :class:`TimmECAResNet`."""
    return _create(TimmECAResNet, "eca_resnet152", pretrained, {"depth": 152, **kwargs})


@register_model
def eca_mobilenet_v2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ECA-MobileNetV2 for timm: see :class:`TimmECAMobileNetV2`."""
    return _create(TimmECAMobileNetV2, "eca_mobilenet_v2", pretrained, kwargs)
