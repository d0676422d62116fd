"""Children replaced, wrapped, folded, converted, removed, shared, and their attributes set."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch import Tensor
from torch.nn.utils import fusion, parametrizations, parametrize
from torchvision.models.resnet import BasicBlock
from torchvision.ops import SqueezeExcitation, StochasticDepth
from torchvision.ops.misc import FrozenBatchNorm2d

from fastres import unfuse
from fastres.nn import DropoutBasicBlock, DropoutBottleneck
from tests.altered.compare import Draw
from tests.altered.subjects import (
    BASIC,
    BLOCKS,
    BOTTLENECK,
    DIRECT_BASIC,
    NETWORK,
    NORM_ACT,
    PREACTIVATION,
    PROJECTED,
    RESIDUAL,
    SHORTCUT,
    SKIP,
    STEM,
    SUBJECTS,
    WINOGRAD,
    Subject,
    each,
    has,
    replace,
)
from tests.altered.table import Table, check

TABLE = Table()
change = TABLE.change

CONV, NORM, RELU = has(nn.Conv2d), has(nn.BatchNorm2d), has(nn.ReLU)
CONVOLVED = (STEM, *BLOCKS, DIRECT_BASIC, SKIP, RESIDUAL, PREACTIVATION, SHORTCUT)


class Scale(nn.Module):
    """An activation or a gate that is nobody's class."""

    def __init__(self, factor: float = 1.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class HalvedReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class DoubledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-3), self.bias)


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


class ChannelNorm(nn.Module):
    """A LayerNorm over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Lora(nn.Module):
    """A frozen convolution and a trained one of low rank beside it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class LoraConv(nn.Conv2d):
    """The same as a subclass that holds its own weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight + self.a * self.b, None)


def norm_of(old: nn.Module) -> int:
    assert isinstance(old, nn.BatchNorm2d)
    return old.num_features


# ---------------------------------------------------------------------------------------------------------- activations

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "Identity": nn.Identity,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1, inplace=True),
    "SiLU": nn.SiLU,
    "PReLU": nn.PReLU,
    "GELU": nn.GELU,
    "ReLU6": lambda: nn.ReLU6(inplace=True),
    "ELU": lambda: nn.ELU(inplace=True),
    "Hardswish": nn.Hardswish,
    "Softplus": nn.Softplus,
    "a ReLU that is not in place": nn.ReLU,
    "a subclass of ReLU": HalvedReLU,
    "ReLU and a gate": lambda: nn.Sequential(nn.ReLU(), Scale()),
    "a gate": Scale,
}
for name, make in ACTIVATIONS.items():
    change(f"relu -> {name}", needs=RELU)(lambda m, draw, make=make: replace(m, nn.ReLU, lambda old: make()))


@change("relu.inplace switched", needs=RELU)
def _(m: nn.Module, draw: Draw) -> None:
    for _parent, _name, relu in each(m, nn.ReLU):
        relu.inplace = not relu.inplace


@change("relu.forward set on the instance", needs=RELU)
def _(m: nn.Module, draw: Draw) -> None:
    for _parent, _name, relu in each(m, nn.ReLU):
        relu.forward = torch.tanh


@change("relu's class assigned", needs=RELU)
def _(m: nn.Module, draw: Draw) -> None:
    for _parent, _name, relu in each(m, nn.ReLU):
        relu.__class__ = HalvedReLU


@change("the one relu is a function", (*BLOCKS, STEM, RESIDUAL, PREACTIVATION))
def _(m: nn.Module, draw: Draw) -> None:
    del m.relu
    m.relu = F.silu


@change("relu deleted", (*BLOCKS, STEM, RESIDUAL, PREACTIVATION), refused=(AttributeError,))
def _(m: nn.Module, draw: Draw) -> None:
    del m.relu


# ------------------------------------------------------------------------------------------------------- normalisations

NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "GroupNorm": lambda old: nn.GroupNorm(2, norm_of(old)),
    "GroupNorm of one group": lambda old: nn.GroupNorm(1, norm_of(old)),
    "InstanceNorm2d": lambda old: nn.InstanceNorm2d(norm_of(old)),
    "InstanceNorm2d with parameters and statistics": lambda old: nn.InstanceNorm2d(
        norm_of(old), affine=True, track_running_stats=True
    ),
    "LayerNorm over channels": lambda old: ChannelNorm(norm_of(old)),
    "FrozenBatchNorm2d": lambda old: FrozenBatchNorm2d(norm_of(old)),
    "Identity": lambda old: nn.Identity(),
    "another BatchNorm2d": lambda old: nn.BatchNorm2d(norm_of(old), eps=0.1, momentum=0.5),
    "BatchNorm2d without parameters": lambda old: nn.BatchNorm2d(norm_of(old), affine=False),
    "BatchNorm2d without statistics": lambda old: nn.BatchNorm2d(norm_of(old), track_running_stats=False),
    "BatchNorm2d without both": lambda old: nn.BatchNorm2d(norm_of(old), affine=False, track_running_stats=False),
    "BatchNorm2d averaging": lambda old: nn.BatchNorm2d(norm_of(old), momentum=None),
    "a subclass of BatchNorm2d": lambda old: ShiftedNorm(norm_of(old)),
    "LocalResponseNorm": lambda old: nn.LocalResponseNorm(3),
    "norm and squeeze-excitation": lambda old: nn.Sequential(old, SqueezeExcitation(norm_of(old), 4)),
    "norm and Dropout(1)": lambda old: nn.Sequential(old, nn.Dropout(1.0)),
    "norm and Dropout2d(0)": lambda old: nn.Sequential(old, nn.Dropout2d(0.0)),
    "norm and stochastic depth": lambda old: nn.Sequential(old, StochasticDepth(1.0, "batch")),
    "norm and a gate": lambda old: nn.Sequential(old, Scale()),
    "norm and SiLU": lambda old: nn.Sequential(old, nn.SiLU()),
    "a gate and norm": lambda old: nn.Sequential(Scale(), old),
}
for name, make in NORMS.items():
    change(f"norms -> {name}")(lambda m, draw, make=make: replace(m, nn.BatchNorm2d, make))
for number, what in ((0, "first"), (-1, "last")):
    for name in ("GroupNorm", "Identity", "FrozenBatchNorm2d", "norm and squeeze-excitation", "BatchNorm2d averaging"):
        change(f"{what} norm -> {name}", (STEM, *BLOCKS, RESIDUAL, PREACTIVATION))(
            lambda m, draw, make=NORMS[name], n=number: replace(m, nn.BatchNorm2d, make, only=n)
        )

for name, make in {
    "Dropout(0.3)": lambda old: nn.Sequential(old, nn.Dropout(0.3)),
    "Dropout2d(0.3)": lambda old: nn.Sequential(old, nn.Dropout2d(0.3)),
    "stochastic depth of rows": lambda old: nn.Sequential(old, StochasticDepth(0.5, "row")),
}.items():
    # The same seed gives plain PyTorch's own masks.
    change(f"norms -> norm and {name}", exact=False)(lambda m, draw, make=make: replace(m, nn.BatchNorm2d, make))


def norms(m: nn.Module) -> list[nn.BatchNorm2d]:
    return [n for n in m.modules() if isinstance(n, nn.BatchNorm2d)]


ATTRIBUTES: dict[str, Callable[[nn.BatchNorm2d], object]] = {
    "eps = 1": lambda n: setattr(n, "eps", 1.0),
    "momentum = None": lambda n: setattr(n, "momentum", None),
    "momentum = 0": lambda n: setattr(n, "momentum", 0.0),
    "momentum = 1": lambda n: setattr(n, "momentum", 1.0),
    "track_running_stats = False": lambda n: setattr(n, "track_running_stats", False),
    "running statistics = None": lambda n: [setattr(n, k, None) for k in ("running_mean", "running_var")],
    "num_batches_tracked = None": lambda n: setattr(n, "num_batches_tracked", None),
    "num_batches_tracked = None, averaging": lambda n: [
        setattr(n, "num_batches_tracked", None), setattr(n, "momentum", None),
    ],
    "weight = None": lambda n: setattr(n, "weight", None),
    "bias = None": lambda n: setattr(n, "bias", None),
    "a new weight": lambda n: setattr(n, "weight", nn.Parameter(n.weight.detach() * 2)),
    "new running statistics": lambda n: setattr(n, "running_var", n.running_var * 4),
    "reset_running_stats": lambda n: n.reset_running_stats(),
    "reset_parameters": lambda n: n.reset_parameters(),
    "weight without gradient": lambda n: n.weight.requires_grad_(False),
    "bias without gradient": lambda n: n.bias.requires_grad_(False),
    "forward set on the instance": lambda n: setattr(n, "forward", lambda x: x * 2),
    "class assigned": lambda n: setattr(n, "__class__", ShiftedNorm),
    "affine said to be off": lambda n: setattr(n, "affine", False),
    "negative weights": lambda n: n.weight.data.neg_(),
    "weights of zero": lambda n: nn.init.zeros_(n.weight),
}  # fmt: skip
for name, act in ATTRIBUTES.items():
    change(f"norms: {name}")(lambda m, draw, act=act: [act(n) for n in norms(m)])
    if name in ("momentum = None", "track_running_stats = False", "weight = None", "running statistics = None"):
        change(f"last norm: {name}", (*BLOCKS, RESIDUAL, PREACTIVATION))(lambda m, draw, act=act: act(norms(m)[-1]))


@change("one BatchNorm used twice", (BASIC, PROJECTED, RESIDUAL, PREACTIVATION, DIRECT_BASIC))
def _(m: nn.Module, draw: Draw) -> None:
    m.bn2 = m.bn1


@change("one convolution used twice", (BASIC, DIRECT_BASIC))
def _(m: nn.Module, draw: Draw) -> None:
    m.conv2 = m.conv1


@change("one weight in two convolutions", (BASIC, DIRECT_BASIC))
def _(m: nn.Module, draw: Draw) -> None:
    m.conv2.weight = m.conv1.weight


@change("the norms' buffers deleted", refused=(AttributeError,))
def _(m: nn.Module, draw: Draw) -> None:
    for n in norms(m):
        del n.running_mean


@change("norms deleted", refused=(AttributeError,), columns=(STEM, *BLOCKS, RESIDUAL, PREACTIVATION))
def _(m: nn.Module, draw: Draw) -> None:
    del m.bn1


# --------------------------------------------------------------------------------------------------------- convolutions


def other_conv(**options: object) -> Callable[[nn.Module], nn.Module]:
    """A convolution as it was but for some options; a bigger kernel is padded as before."""

    def make(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.Conv2d)
        kept = {
            "kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding, "groups": old.groups,
            "bias": old.bias is not None,
        }  # fmt: skip
        chosen = {**kept, **options}
        if "padding" not in options:
            dilation = chosen.get("dilation", 1)
            size = chosen["kernel_size"]
            chosen["padding"] = dilation * ((size if isinstance(size, int) else size[0]) - 1) // 2
        return nn.Conv2d(old.in_channels, old.out_channels, **chosen)

    return make


def separable(old: nn.Module) -> nn.Module:
    assert isinstance(old, nn.Conv2d)
    depthwise = nn.Conv2d(
        old.in_channels, old.in_channels, old.kernel_size, old.stride, old.padding, groups=old.in_channels, bias=False
    )
    return nn.Sequential(depthwise, nn.Conv2d(old.in_channels, old.out_channels, 1, bias=False))


CONVS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "dilated": other_conv(dilation=2),
    "biased": other_conv(bias=True),
    "of 5x5": other_conv(kernel_size=5),
    "of 1x1": other_conv(kernel_size=1),
    "of 3x3": other_conv(kernel_size=3),
    "reflecting": other_conv(padding_mode="reflect", kernel_size=3),
    "circular": other_conv(padding_mode="circular", kernel_size=3),
    "with a subclass": lambda old: DoubledConv(
        old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
    ),
    "with standardised weights": lambda old: StandardisedConv(
        old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
    ),
    "separable": separable,
    "Lora": Lora,
    "a gate before it": lambda old: nn.Sequential(Scale(), old),
    "a gate behind it": lambda old: nn.Sequential(old, Scale()),
    "in a Sequential": lambda old: nn.Sequential(old),
}  # fmt: skip
for name, make in CONVS.items():
    change(f"convolutions -> {name}", CONVOLVED)(lambda m, draw, make=make: replace(m, nn.Conv2d, make))
change("convolutions -> grouped", (*BLOCKS, DIRECT_BASIC, SKIP, RESIDUAL, PREACTIVATION, SHORTCUT))(
    lambda m, draw: replace(m, nn.Conv2d, other_conv(groups=2))
)
for name in ("dilated", "biased", "of 5x5", "Lora"):
    for number, what in ((0, "first"), (1, "second")):
        change(f"{what} convolution -> {name}", (*BLOCKS, RESIDUAL, PREACTIVATION))(
            lambda m, draw, make=CONVS[name], n=number: replace(m, nn.Conv2d, make, only=n)
        )


def convs(m: nn.Module) -> list[nn.Conv2d]:
    return [c for c in m.modules() if isinstance(c, nn.Conv2d)]


def set_lora(conv: nn.Conv2d) -> None:
    conv.__class__ = LoraConv
    conv.a = nn.Parameter(torch.full((conv.out_channels, 1, 1, 1), 0.1))
    conv.b = nn.Parameter(torch.linspace(-1, 1, conv.in_channels).reshape(1, -1, 1, 1))


class Squared(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * w.abs()


CONV_CHANGES: dict[str, Callable[[nn.Conv2d], object]] = {
    "weight_norm": lambda c: torch.nn.utils.weight_norm(c),
    "weight_norm, removed": lambda c: torch.nn.utils.remove_weight_norm(torch.nn.utils.weight_norm(c)),
    "spectral_norm": lambda c: torch.nn.utils.spectral_norm(c),
    "weight_norm as parametrization": lambda c: parametrizations.weight_norm(c),
    "spectral_norm as parametrization": lambda c: parametrizations.spectral_norm(c),
    "orthogonal": lambda c: parametrizations.orthogonal(c),
    "a parametrization": lambda c: parametrize.register_parametrization(c, "weight", Squared()),
    "a parametrization, removed": lambda c: [
        parametrize.register_parametrization(c, "weight", Squared()), parametrize.remove_parametrizations(c, "weight"),
    ],
    "pruned": lambda c: prune.l1_unstructured(c, "weight", 0.5),
    "pruned by channel": lambda c: prune.ln_structured(c, "weight", 0.5, n=2, dim=0),
    "pruned for good": lambda c: prune.remove(prune.l1_unstructured(c, "weight", 0.5), "weight"),
    "a bias set": lambda c: setattr(c, "bias", nn.Parameter(torch.full((c.out_channels,), 0.3))),
    "a new weight": lambda c: setattr(c, "weight", nn.Parameter(c.weight.detach() * 2)),
    "a frozen weight": lambda c: c.weight.requires_grad_(False),
    "padding set": lambda c: setattr(c, "padding", tuple(p + 1 for p in c.padding)),
    "padding mode set": lambda c: setattr(c, "padding_mode", "circular"),
    "forward set on the instance": lambda c: setattr(
        c, "forward", lambda x: F.conv2d(x, c.weight, None, c.stride, c.padding) * 2
    ),
    "_conv_forward set on the instance": lambda c: setattr(
        c, "_conv_forward", lambda x, w, b: F.conv2d(x, w * 2, b, c.stride, c.padding)
    ),
    "class assigned": lambda c: setattr(c, "__class__", DoubledConv),
    "Lora within": set_lora,
    "a weight of channels_last": lambda c: c.to(memory_format=torch.channels_last),
    "a weight of other strides": lambda c: setattr(
        c, "weight", nn.Parameter(c.weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
    ),
}  # fmt: skip
for name, act in CONV_CHANGES.items():
    change(f"convolutions: {name}", CONVOLVED, refused=(RuntimeError,) if name == "padding set" else ())(
        lambda m, draw, act=act: [act(c) for c in convs(m)]
    )


@change("convolutions whose padding was cut", (BASIC, PROJECTED, RESIDUAL, PREACTIVATION), refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> None:
    m.conv2.padding = (0, 0)


@change("convolutions pruned globally", BLOCKS)
def _(m: nn.Module, draw: Draw) -> None:
    prune.global_unstructured([(c, "weight") for c in convs(m)], prune.L1Unstructured, amount=0.5)


@change("pruned to fewer channels", (BASIC, DIRECT_BASIC))
def _(m: nn.Module, draw: Draw) -> None:
    kept = torch.tensor([0, 2, 3, 5, 6])
    first, second = other_conv()(m.conv1), other_conv()(m.conv2)
    first.weight, second.weight = nn.Parameter(m.conv1.weight[kept]), nn.Parameter(m.conv2.weight[:, kept])
    first.out_channels = second.in_channels = len(kept)
    norm = nn.BatchNorm2d(len(kept))
    norm.weight, norm.bias = nn.Parameter(m.bn1.weight[kept]), nn.Parameter(m.bn1.bias[kept])
    m.conv1, m.bn1, m.conv2 = first, norm, second


# ------------------------------------------------------------------------------------------------- folded and converted


@change("folded by fuse_conv_bn_eval")
def _(m: nn.Module, draw: Draw) -> None:
    m.eval()
    for parent in list(m.modules()):
        children = list(parent.named_children())
        for (name, conv), (following, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent._modules[name] = fusion.fuse_conv_bn_eval(conv, norm)
                parent._modules[following] = nn.Identity()


@change("folded in place by fuse_conv_bn_weights")
def _(m: nn.Module, draw: Draw) -> None:
    m.eval()
    for parent in list(m.modules()):
        children = list(parent.named_children())
        for (_, conv), (following, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                conv.weight, conv.bias = fusion.fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                parent._modules[following] = nn.Identity()


def groups_of(m: nn.Module) -> list[list[str]]:
    """Names of conv, bn (and relu) as the user of torch.ao writes them down for a block."""
    if isinstance(m, nn.Sequential):
        return [["0", "1", "2"]] if len(m) == 3 else [["0", "1"]]
    last = [["conv2", "bn2"]] if not hasattr(m, "conv3") else [["conv2", "bn2"], ["conv3", "bn3"]]
    found = [["conv1", "bn1", "relu"], *(last if hasattr(m, "conv2") else [])]
    if getattr(m, "downsample", None) is not None:
        found.append(["downsample.0", "downsample.1"])
    return found


AO = (STEM, *BLOCKS, SKIP, SHORTCUT)


@change("torch.ao: fuse_modules", AO)
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return torch.ao.quantization.fuse_modules(m.eval(), groups_of(m))


@change("torch.ao: fuse_modules of conv and bn", AO)
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return torch.ao.quantization.fuse_modules(m.eval(), [g[:2] for g in groups_of(m)])


@change("torch.ao: fuse_modules_qat", AO)
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return torch.ao.quantization.fuse_modules_qat(m.train(), groups_of(m))


@change("torch.ao: prepare", SUBJECTS)
def _(m: nn.Module, draw: Draw) -> nn.Module:
    m.eval().qconfig = torch.ao.quantization.default_qconfig
    return torch.ao.quantization.prepare(m)


@change("torch.ao: fuse_modules and prepare", AO)
def _(m: nn.Module, draw: Draw) -> nn.Module:
    m = torch.ao.quantization.fuse_modules(m.eval(), groups_of(m))
    m.qconfig = torch.ao.quantization.default_qconfig
    return torch.ao.quantization.prepare(m)


# Fake quantisation rounds: float64 lands on another step.
@change("torch.ao: prepare_qat", SUBJECTS, exact=False)
def _(m: nn.Module, draw: Draw) -> nn.Module:
    m.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(m)


@change("torch.ao: QuantWrapper", SUBJECTS)
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return torch.ao.quantization.QuantWrapper(m)


@change("SyncBatchNorm", refused=(ValueError,))
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(m)


@change("SyncBatchNorm and back by class", refused=(ValueError,))
def _(m: nn.Module, draw: Draw) -> nn.Module:
    m = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    for parent, name, child in each(m, nn.SyncBatchNorm):
        new = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
        new.load_state_dict(child.state_dict())
        parent._modules[name] = new
    return m


@change("replaced by a user's own recursion over isinstance")
def _(m: nn.Module, draw: Draw) -> nn.Module:
    def convert(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.BatchNorm2d):
            return nn.GroupNorm(2, module.num_features)
        for name, child in module.named_children():
            setattr(module, name, convert(child))
        return module

    return convert(m)


@change("FrozenBatchNorm2d by a user's own recursion over the state")
def _(m: nn.Module, draw: Draw) -> None:
    for parent, name, child in each(m, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(child.num_features, child.eps)
        frozen.load_state_dict(child.state_dict())
        parent._modules[name] = frozen


@change("torch.func.replace_all_batch_norm_modules_")
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return torch.func.replace_all_batch_norm_modules_(m)


def with_timm(act: Callable[..., nn.Module | None]) -> Callable[[nn.Module, Draw], nn.Module | None]:
    """timm is no requirement: without it the row is skipped."""
    return lambda m, draw: act(m, pytest.importorskip("timm"))


change("timm: convert_sync_batchnorm", refused=(ValueError,))(
    with_timm(lambda m, timm: timm.layers.convert_sync_batchnorm(m))
)
change("timm: convert_splitbn_model")(with_timm(lambda m, timm: timm.layers.convert_splitbn_model(m, 2)))
change("timm: freeze_batch_norm_2d")(with_timm(lambda m, timm: timm.utils.model.freeze_batch_norm_2d(m)))
change("timm: freeze and unfreeze_batch_norm_2d")(
    with_timm(lambda m, timm: timm.utils.model.unfreeze_batch_norm_2d(timm.utils.model.freeze_batch_norm_2d(m)))
)
change("timm: BatchNormAct2d in place of norms")(
    with_timm(
        lambda m, timm: replace(
            m, nn.BatchNorm2d, lambda old: timm.layers.BatchNormAct2d(norm_of(old), act_layer=nn.SiLU, inplace=False)
        )
    )
)
change("timm: BlurPool and SE in place of convolutions", BLOCKS)(
    with_timm(lambda m, timm: replace(m, nn.Conv2d, lambda old: nn.Sequential(old, timm.layers.EcaModule())))
)
change("timm: DropPath behind norms")(
    with_timm(lambda m, timm: replace(m, nn.BatchNorm2d, lambda old: nn.Sequential(old, timm.layers.DropPath(0.0))))
)


# -------------------------------------------------------------------------------------------------- blocks and networks


@change("downsample put in", (BASIC, DIRECT_BASIC))
def _(m: nn.Module, draw: Draw) -> None:
    m.downsample = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))


DOWNSAMPLES: dict[str, Callable[[], nn.Module]] = {
    "pooled": lambda: nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12)
    ),
    "a convolution alone": lambda: nn.Conv2d(16, 12, 1, 2),
    "a convolution in a Sequential": lambda: nn.Sequential(nn.Conv2d(16, 12, 1, 2)),
    "of 3x3": lambda: nn.Sequential(nn.Conv2d(16, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(16, 12, 1, 2, groups=2, bias=False), nn.BatchNorm2d(12)),
    "with GroupNorm": lambda: nn.Sequential(nn.Conv2d(16, 12, 1, 2, bias=False), nn.GroupNorm(2, 12)),
    "with ReLU": lambda: nn.Sequential(nn.Conv2d(16, 12, 1, 2, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 12, 1, 2, bias=False)),
    "averaging": lambda: nn.Sequential(nn.Conv2d(16, 12, 1, 2, bias=False), nn.BatchNorm2d(12, momentum=None)),
    "without parameters": lambda: nn.Sequential(
        nn.Conv2d(16, 12, 1, 2, bias=False), nn.BatchNorm2d(12, affine=False)
    ),
}  # fmt: skip
for name, make in DOWNSAMPLES.items():
    change(f"downsample -> {name}", (PROJECTED,))(lambda m, draw, make=make: setattr(m, "downsample", make()))


@change("downsample -> Identity", (BASIC, BOTTLENECK))
def _(m: nn.Module, draw: Draw) -> None:
    m.downsample = nn.Identity()


@change("downsample -> a function", (BASIC, BOTTLENECK))
def _(m: nn.Module, draw: Draw) -> None:
    m.downsample = torch.sin


@change("downsample.forward set on the instance", (PROJECTED,))
def _(m: nn.Module, draw: Draw) -> None:
    plain = m.downsample.forward
    m.downsample.forward = lambda x: plain(x) * 2


@change("the norm of the downsample is bn2", (PROJECTED,))
def _(m: nn.Module, draw: Draw) -> None:
    m.downsample[1] = m.bn2


@change("downsample taken away", (PROJECTED,), refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> None:
    m.downsample = None


@change("more modules in the downsample", (PROJECTED, SKIP, SHORTCUT))
def _(m: nn.Module, draw: Draw) -> None:
    (m if isinstance(m, nn.Sequential) else m.downsample).append(Scale())


@change("forward set on the instance")
def _(m: nn.Module, draw: Draw) -> None:
    plain = m.forward
    m.forward = lambda x: plain(x) * 2


@change("forward set on the instance, bound", BLOCKS)
def _(m: nn.Module, draw: Draw) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return F.leaky_relu(self.bn2(self.conv2(self.relu(out)))) + out.mean()

    m.forward = types.MethodType(forward, m)


@change("class assigned with another forward", BLOCKS)
def _(m: nn.Module, draw: Draw) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return super(m.__class__, self).forward(x) * 2

    m.__class__ = type("Doubled", (type(m),), {"forward": forward})


@change("a child that nobody calls", (STEM, *BLOCKS, NORM_ACT, RESIDUAL, PREACTIVATION))
def _(m: nn.Module, draw: Draw) -> None:
    m.add_module("unused", nn.Linear(2, 2))


@change("a block used twice", (BASIC, DIRECT_BASIC, BOTTLENECK))
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return nn.Sequential(m, m)


@change("a block and its copy", (BASIC, BOTTLENECK))
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return nn.Sequential(m, copy.deepcopy(m))


@change("two blocks that share a convolution", (BASIC, BOTTLENECK))
def _(m: nn.Module, draw: Draw) -> nn.Module:
    other = copy.deepcopy(m)
    other.conv2 = m.conv2
    return nn.Sequential(m, other)


class Around(nn.Module):
    """A user's wrapper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mul_(2)


@change("wrapped, with its output changed in place", (STEM, RESIDUAL, PREACTIVATION, SHORTCUT, NETWORK))
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return Around(m)


@change("stochastic depth behind a block", BLOCKS)
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return nn.Sequential(m, StochasticDepth(0.0, "row"))


@change("a head replaced", (STEM, NETWORK))
def _(m: nn.Module, draw: Draw) -> None:
    m.fc = nn.Linear(m.fc.in_features, 7)


@change("no head", (STEM, NETWORK))
def _(m: nn.Module, draw: Draw) -> None:
    m.fc = nn.Identity()


@change("a stem of another convolution", (STEM, NETWORK))
def _(m: nn.Module, draw: Draw) -> None:
    m.conv1, m.maxpool = nn.Conv2d(3, 16, 5, padding=2), nn.Identity()


@change("squeeze-excitation behind the stages", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> None:
    m.layer1 = nn.Sequential(m.layer1, SqueezeExcitation(16, 4))


@change("another block behind a stage", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> None:
    m.layer1.append(BasicBlock(16, 16))


@change("cut into a Sequential of its children", (STEM, NETWORK, SKIP, SHORTCUT))
def _(m: nn.Module, draw: Draw) -> nn.Module:
    return nn.Sequential(*list(m.children())[:6])


@change("everything in the network at once", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> None:
    replace(m, nn.ReLU, lambda old: nn.SiLU())
    replace(m, nn.BatchNorm2d, NORMS["GroupNorm of one group"])


# ---------------------------------------------------------------------------------------------------- dropout in blocks

DROPPING = tuple(
    Subject(name, functools.partial(cls, channels, planes, dropout=0.4), WINOGRAD, channels)
    for name, cls, channels, planes in (
        ("basic-dropping", DropoutBasicBlock, 8, 8), ("bottleneck-dropping", DropoutBottleneck, 16, 4),
    )
)  # fmt: skip

# Off the faster way dropout is PyTorch's own, and the same seed gives the same mask.
for name, act in {
    "relu -> Tanh": lambda m: replace(m, nn.ReLU, lambda old: nn.Tanh()),
    "norms -> GroupNorm": lambda m: replace(m, nn.BatchNorm2d, NORMS["GroupNorm"]),
    "a hook on conv1": lambda m: m.conv1.register_forward_hook(lambda m, args, y: y * 2),
    "convolutions biased, a norm frozen": lambda m: [replace(m, nn.Conv2d, other_conv(bias=True)), m.bn2.eval()],
    "norms frozen": lambda m: [n.eval() for n in norms(m)],
    "one norm frozen": lambda m: [m.bn1.eval()],
    "forward of the relu set": lambda m: setattr(m.relu, "forward", torch.tanh),
}.items():
    change(f"with dropout, {name}", DROPPING, exact=False)(lambda m, draw, act=act: act(m))


@change("with dropout, its rate set to 0", DROPPING)
def _(m: nn.Module, draw: Draw) -> None:
    m.dropout = 0.0


@change("with dropout, in evaluation", DROPPING)
def _(m: nn.Module, draw: Draw) -> None:
    m.eval()


# ---------------------------------------------------------------------------------------------------------------- tests


@TABLE.every()
def test_an_altered_module_does_what_the_plain_one_does(row, subject):
    check(row, subject)


@TABLE.every(PROJECTED)
def test_a_module_altered_before_it_was_fused_does_what_it_did(row, subject):
    def act(m: nn.Module, draw: Draw) -> nn.Module:
        return subject.fused(row.alter(m, draw))

    check(row, subject, subject.make_plain, dataclasses.replace(row, act=act))


@TABLE.every(PROJECTED)
def test_a_module_altered_and_unfused_does_what_it_did(row, subject):
    def act(m: nn.Module, draw: Draw) -> nn.Module:
        return unfuse(row.alter(m, draw), inplace=True)

    check(row, subject, subject.make_fused, dataclasses.replace(row, act=act))
