"""The paper's Table 3, as printed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """A row of the table: ImageNet, pictures of 224 x 224.

    Attributes:
        name: Name of the network in the table.
        parameters: As printed, in units of 2^20; for competitors as in their own papers, in millions.
        flops: Multiply-adds and more (see :class:`ecanet.profile.Counts`), in units of 2^30; for MobileNetV2 of 2^20.
        train: Images per second in training, on four RTX 2080 Ti; None if not given.
        inference: Images per second at inference; None if not given.
        top1: Top-1 accuracy in per cent.
        top5: Top-5 accuracy in per cent.
        network: Name of the backbone in :data:`ecanet.models.MODELS`.
        gate: Name of the gate, or None.
        measured: Whether the network can be built here. Otherwise the row has only the paper's figures.
    """

    name: str
    parameters: str
    flops: str
    train: int | None
    inference: int | None
    top1: float
    top5: float
    network: str
    gate: str | None
    measured: bool = True


_50, _101, _152, _MOBILE = "eca_resnet50", "eca_resnet101", "eca_resnet152", "eca_mobilenet_v2"

#: Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, Table 3.
TABLE3 = (
    PaperRow("ResNet-50", "24.37M", "3.86G", 1024, 1855, 75.20, 92.52, _50, None),
    PaperRow("ResNet-50 + SE", "26.77M", "3.87G", 759, 1620, 76.71, 93.38, _50, "se"),
    PaperRow("ResNet-50 + CBAM", "26.77M", "3.87G", 472, 1213, 77.34, 93.69, _50, "cbam"),
    PaperRow("ResNet-50 + A2-Nets", "33.00M", "6.50G", None, None, 77.00, 93.50, _50, "a2", measured=False),
    PaperRow("ResNet-50 + GCNet", "28.08M", "3.87G", None, None, 77.70, 93.66, _50, "gc"),
    PaperRow("ResNet-50 + GSoP-Net1", "28.05M", "6.18G", 596, 1383, 77.68, 93.98, _50, "gsop", measured=False),
    PaperRow("ResNet-50 + AA-Net", "25.80M", "4.15G", None, None, 77.70, 93.80, _50, "aa", measured=False),
    PaperRow("ResNet-50 + ECA", "24.37M", "3.86G", 785, 1805, 77.48, 93.68, _50, "eca"),
    PaperRow("ResNet-101", "42.49M", "7.34G", 386, 1174, 76.83, 93.48, _101, None),
    PaperRow("ResNet-101 + SE", "47.01M", "7.35G", 367, 1044, 77.62, 93.93, _101, "se"),
    PaperRow("ResNet-101 + CBAM", "47.01M", "7.35G", 270, 635, 78.49, 94.31, _101, "cbam"),
    PaperRow("ResNet-101 + ECA", "42.49M", "7.35G", 380, 1089, 78.65, 94.34, _101, "eca"),
    PaperRow("ResNet-152", "57.40M", "10.82G", 281, 815, 77.58, 93.66, _152, None),
    PaperRow("ResNet-152 + SE", "63.68M", "10.85G", 268, 761, 78.43, 94.27, _152, "se"),
    PaperRow("ResNet-152 + ECA", "57.40M", "10.83G", 279, 785, 78.92, 94.55, _152, "eca"),
    PaperRow("MobileNetV2", "3.34M", "319.4M", 711, 2086, 71.64, 90.20, _MOBILE, None),
    PaperRow("MobileNetV2 + SE", "3.40M", "320.1M", 671, 2000, 72.42, 90.67, _MOBILE, "se"),
    PaperRow("MobileNetV2 + ECA", "3.34M", "319.9M", 676, 2010, 72.56, 90.81, _MOBILE, "eca"),
)


def paper_row(network: str, gate: str | None) -> PaperRow | None:
    """The row of a backbone with a gate, or None; ``torchvision/resnet50`` is the backbone of ``eca_resnet50``.

    Example:
        >>> paper_row("torchvision/resnet50", "se").parameters
        '26.77M'
    """
    backbone = f"eca_{network.removeprefix('torchvision/')}" if network.startswith("torchvision/") else network
    return next((row for row in TABLE3 if row.measured and (row.network, row.gate) == (backbone, gate)), None)
