"""The architectures that surgery is tested on and that docs/surgery.md lists: the smallest of each family."""

from typing import NamedTuple

OK = "ok"
NO_BLOCK = "finds no residual block"
HAS_ATTENTION = "replace_gates_ swaps it"
NO_MODULE = "which is not a module: name a module before it"
CHANNELS_LAST = "channels last"


class Architecture(NamedTuple):
    """One network and what insertion does to it.

    Attributes:
        name: ``torchvision/NAME`` or ``timm/NAME``.
        size: Height and width of a small input that it takes, with two pictures or more in training mode.
        expected: ``"ok"``, or a fragment of the documented ``ValueError``. Where an error is expected the network may
            be built on the meta device.
        where: As in ``insert_gates_``.
    """

    name: str
    size: int = 32
    expected: str = OK
    where: str = "block"


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("torchvision/resnet18"),
    Architecture("torchvision/resnet50"),
    Architecture("torchvision/resnext50_32x4d"),
    Architecture("torchvision/wide_resnet50_2"),
    Architecture("torchvision/regnet_x_400mf"),
    Architecture("torchvision/regnet_y_400mf"),
    Architecture("torchvision/mobilenet_v2"),
    Architecture("torchvision/mobilenet_v3_small"),
    Architecture("torchvision/mobilenet_v3_large"),
    Architecture("torchvision/efficientnet_b0"),
    Architecture("torchvision/efficientnet_v2_s"),
    Architecture("torchvision/mnasnet0_5"),
    Architecture("torchvision/shufflenet_v2_x0_5"),
    Architecture("torchvision/densenet121"),
    Architecture("torchvision/convnext_tiny"),
    Architecture("torchvision/vgg11_bn", where="conv"),
    Architecture("torchvision/squeezenet1_1", where="conv"),
    Architecture("timm/resnet10t"),
    Architecture("timm/resnet26d"),
    Architecture("timm/resnext26ts"),
    Architecture("timm/skresnet18"),
    Architecture("timm/resnest14d"),
    Architecture("timm/resnetv2_18"),
    Architecture("timm/resnetv2_50x1_bit"),
    Architecture("timm/regnetx_002"),
    Architecture("timm/regnety_002"),
    Architecture("timm/regnetz_005"),
    Architecture("timm/mobilenetv1_100"),
    Architecture("timm/mobilenetv2_050"),
    Architecture("timm/mobilenetv3_small_050"),
    Architecture("timm/mobilenetv4_conv_small_035"),
    Architecture("timm/tf_efficientnet_lite0"),
    Architecture("timm/tf_efficientnetv2_b0"),
    Architecture("timm/tinynet_e"),
    Architecture("timm/mnasnet_small"),
    Architecture("timm/mixnet_s"),
    Architecture("timm/lcnet_050"),
    Architecture("timm/ghostnet_050"),
    Architecture("timm/convnext_atto"),
    Architecture("timm/convnextv2_atto"),
    Architecture("timm/nf_regnet_b0"),
    Architecture("timm/nf_resnet26"),
    Architecture("timm/densenet121"),
    Architecture("timm/cspresnet50"),
    Architecture("timm/cs3darknet_s"),
    Architecture("timm/gernet_s"),
    Architecture("timm/res2net50_26w_4s"),
    Architecture("timm/hrnet_w18_small"),
    Architecture("timm/dla46_c"),
    Architecture("timm/dpn48b"),
    Architecture("timm/xception41"),
    Architecture("timm/rexnet_100"),
    Architecture("timm/fasternet_t0"),
    Architecture("timm/poolformer_s12"),
    Architecture("timm/seresnet18", expected=HAS_ATTENTION),
    Architecture("timm/legacy_seresnet18", expected=HAS_ATTENTION),
    Architecture("timm/ecaresnet26t", expected=HAS_ATTENTION),
    Architecture("timm/eca_nfnet_l0", expected=HAS_ATTENTION),
    Architecture("timm/dpn68", expected=NO_MODULE),
    Architecture("timm/mambaout_femto", expected=CHANNELS_LAST),
    Architecture("torchvision/vgg11", expected=NO_BLOCK),
    Architecture("timm/ese_vovnet19b_slim_dw", expected=NO_BLOCK),
    Architecture("timm/vit_tiny_patch16_224", 224, NO_BLOCK),
    Architecture("timm/swin_tiny_patch4_window7_224", 224, NO_BLOCK),
)
