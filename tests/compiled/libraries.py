"""Networks of timm, torchvision and transformers, with as few channels and blocks as show what their full sizes have.

Each is made from the library's own classes; a function imports its library when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor

_STAGES: dict[str, Any] = {"layers": (1, 2, 1, 1), "channels": (16, 16, 32, 32), "stem_width": 8, "num_classes": 5}


def _timm(name: str, **keywords: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, **keywords)
        return model

    return make


def _timm_vgg() -> nn.Module:
    from timm.models.vgg import VGG

    model: nn.Module = VGG([8, "M", 16, "M", 16, 16, "M"], num_classes=5, mlp_ratio=0.005, norm_layer=nn.BatchNorm2d)
    return model


def _timm_regnety() -> nn.Module:
    from timm.models.regnet import RegNet, RegNetCfg

    config = RegNetCfg(depth=6, w0=8, wa=8.0, wm=2.0, group_size=4, se_ratio=0.25, stem_width=8)
    model: nn.Module = RegNet(config, num_classes=5)
    return model


def _timm_repvgg() -> nn.Module:
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    blocks = tuple(ByoBlockCfg(type="rep", d=d, c=c, s=2, gs=0) for d, c in ((2, 8), (2, 16)))
    model: nn.Module = ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=5)
    return model


def _transformers_resnet(**keywords: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(embedding_size=8, num_labels=5, **keywords)

        class Logits(ResNetForImageClassification):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Tensor:
                logits: Tensor = super().forward(pixel_values=x).logits
                return logits

        model: nn.Module = Logits(config)
        return model

    return make


def _torchvision_resnet(**keywords: Any) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=1, width_per_group=8, **keywords)


def _torchvision_inception() -> nn.Module:
    from torchvision.models.googlenet import BasicConv2d, Inception

    return nn.Sequential(
        BasicConv2d(3, 8, kernel_size=3, padding=1), Inception(8, 4, 4, 8, 4, 8, 4), Inception(24, 4, 4, 8, 4, 8, 4)
    )


def _torchvision_googlenet() -> nn.Module:
    from torchvision.models import googlenet

    model: nn.Module = googlenet(weights=None, init_weights=False, aux_logits=False, num_classes=5, dropout=0.0)
    return model


def _torchvision_mobilenet_v2() -> nn.Module:
    from torchvision.models import MobileNetV2

    stages = [[1, 8, 1, 1], [6, 16, 2, 2]]
    return MobileNetV2(num_classes=5, width_mult=0.5, inverted_residual_setting=stages, dropout=0.0)


class _Segmentation(nn.Module):
    """torchvision's dilated trunk and head, without the head's dropout."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.models.segmentation.fcn import FCN, FCNHead

        trunk = _torchvision_resnet(replace_stride_with_dilation=[True, True, True])
        head = FCNHead(512, 3)
        head[3] = nn.Identity()
        self.fcn = FCN(IntermediateLayerGetter(trunk, {"layer2": "out"}), head)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fcn(x)["out"]
        return out


class _Trunk(nn.Module):
    """The trunk of torchvision's detectors: normalisations that are constants, and a feature pyramid."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
        from torchvision.ops import FrozenBatchNorm2d

        trunk = _torchvision_resnet(norm_layer=FrozenBatchNorm2d)
        layers = {"layer1": "0", "layer2": "1"}
        self.fpn = BackboneWithFPN(trunk, layers, [256, 512], 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.fpn(x).values())


# Name -> (package, what makes the network, shape of a batch). Ten values a channel or so are left at the end: the
# normalisation of two multiplies rounding errors by more than the comparison allows.
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": ("timm", _timm("resnet18", **_STAGES), (2, 3, 40, 40)),
    "seresnet18": ("timm", _timm("seresnet18", **_STAGES), (2, 3, 40, 40)),
    "resnet50d": ("timm", _timm("resnet50d", **_STAGES), (3, 3, 48, 48)),
    "resnetv2_50": (
        "timm",
        _timm("resnetv2_50", layers=(1, 2), channels=(16, 32), stem_chs=8, num_classes=5),
        (2, 3, 32, 32),
    ),
    "vgg11_bn": ("timm", _timm_vgg, (2, 3, 56, 56)),
    "densenet121": (
        "timm",
        _timm("densenet121", growth_rate=4, block_config=(2, 2), num_classes=5),
        (2, 3, 32, 32),
    ),
    "regnety_002": ("timm", _timm_regnety, (3, 3, 48, 48)),
    "repvgg_a0": ("timm", _timm_repvgg, (2, 3, 16, 16)),
    "dla34": (
        "timm",
        _timm("dla34", levels=[1, 1, 1, 2, 1, 1], channels=[4, 4, 8, 8, 8, 8], num_classes=5),
        (2, 3, 64, 64),
    ),
    "convnext_atto": (
        "timm",
        _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5),
        (2, 3, 32, 32),
    ),
    "mobilenetv3_small_050": ("timm", _timm("mobilenetv3_small_050", num_classes=5), (2, 3, 64, 64)),
    "efficientnet_b0": ("timm", _timm("efficientnet_b0", num_classes=5), (2, 3, 64, 64)),
    "transformers_basic": (
        "transformers",
        _transformers_resnet(hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
        (2, 3, 32, 32),
    ),
    "transformers_bottleneck": (
        "transformers",
        _transformers_resnet(hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck"),
        (2, 3, 32, 32),
    ),
    "inception": ("torchvision", _torchvision_inception, (2, 3, 8, 8)),
    "googlenet": ("torchvision", _torchvision_googlenet, (2, 3, 64, 64)),
    "mobilenet_v2": ("torchvision", _torchvision_mobilenet_v2, (2, 3, 32, 32)),
    "fcn_resnet50": ("torchvision", _Segmentation, (2, 3, 32, 32)),
    "fasterrcnn_trunk": ("torchvision", _Trunk, (2, 3, 64, 64)),
}
# Of their full size: for pytest -m slow.
SLOW = ("mobilenetv3_small_050", "efficientnet_b0", "googlenet")
