"""Residual blocks: torchvision's two with a faster way through them, their twins with dropout, and the block that adds
before its last convolution.

A fused block owns nothing that it changes. Its children are torchvision's, with torch's own meaning; where each is what
its class says and no more (`fastres.nn.trust`) forward takes the fused steps, and otherwise torchvision's own runs.

Where torchvision's blocks take a dropout rate, it is applied between the convolutions: after the ReLU that comes before
the block's last convolution (Zagoruyko and Komodakis 2016, "Wide residual networks", section 2.4). That is after bn1's
ReLU in a basic block and after bn2's in a bottleneck. It acts where the block is in training mode; freezing a
normalisation (`block.bn1.eval()`) does not stop it.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastres.activations import IDENTITY
from fastres.nn.norm import take_over_norm
from fastres.nn.shortcut import PlainSkipConnection, ProjectionShortcut, SkipConnection
from fastres.nn.steps import (
    add_shortcut,
    check_conv_algorithm,
    check_dropout,
    conv_alone,
    conv_norm,
    conv_with_statistics,
    fits_convolution,
    gains_by_channels_last,
    gives_channels_last,
    norm_act,
    norm_act_conv,
    uses_batch_statistics,
)
from fastres.nn.trust import AnyActivation, Fused, activation_of, renamed, why_replaced


class DropoutBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's BasicBlock with dropout between its convolutions: the plain twin of `FusedBasicBlock(dropout=p)`.

    Args:
        dropout: 0 <= dropout < 1; the others as torchvision's block.
    """

    def __init__(self, *args: Any, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = check_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = F.dropout(out, self.dropout, self.training)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout:g}"


class DropoutBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's Bottleneck with dropout before its last convolution: plain twin of `FusedBottleneck(dropout=p)`.

    Args:
        dropout: 0 <= dropout < 1; the others as torchvision's block.
    """

    def __init__(self, *args: Any, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = check_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = F.dropout(out, self.dropout, self.training)
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout:g}"


class FusedBlock(Fused):
    """What the fused blocks share: the choice of the way, and of the memory format to compute in.

    Attributes:
        dropout: the rate between the convolutions.
        conv_algorithm: "auto", "torch", "winograd", "gemm" or "grouped" as in `fastres.functional.conv3x3`,
            `conv1x1_with_statistics` and `grouped_conv2d`; None leaves it to the environment variable FASTRES_CONV.
    """

    # A block that `fastres.fuse` made has none of its own. Typed in comments for TorchScript, as in `Fused`.
    dropout = 0.0
    conv_algorithm = None  # type: str | None
    __constants__ = ["dropout"]  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, expansion * planes, ceil(H / stride), ceil(W / stride)]."""
        if torch.jit.is_scripting() or self._leaves(x):  # type: ignore[attr-defined]
            return self._child_by_child(x)
        return self._in_memory_format(x)

    def _child_by_child(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self._is_replaced():  # type: ignore[attr-defined]
            return self._by_replacement(x)
        if self.dropout == 0.0:
            return self._plain(x)  # type: ignore[no-any-return]
        return self._plain_with_dropout(x)  # type: ignore[no-any-return]

    @torch.jit.unused
    def _is_replaced(self) -> bool:
        return self.dropout == 0.0 and why_replaced(self.stands_for) is not None

    @torch.jit.unused
    def _by_replacement(self, x: Tensor) -> Tensor:
        assert self.stands_for is not None
        return self.stands_for.forward(self, x)  # type: ignore[no-any-return]

    @torch.jit.unused
    def _in_memory_format(self, x: Tensor) -> Tensor:
        """The fused steps, in channels_last where that pays; the result lies as PyTorch's block would leave it."""
        if not self._gains_by_channels_last(x):
            return self._fused(x, x, 1)  # type: ignore[no-any-return]
        convs = (m for m in self._modules.values() if isinstance(m, nn.Conv2d))
        expected = torch.channels_last if gives_channels_last(x, convs) else torch.contiguous_format
        x = x.contiguous(memory_format=torch.channels_last)
        return self._fused(x, x, 1).contiguous(memory_format=expected)  # type: ignore[no-any-return]

    @torch.jit.unused
    def _gains_by_channels_last(self, x: Tensor) -> bool:
        return gains_by_channels_last(x, self.conv1, self.conv2, self.conv_algorithm)

    @torch.jit.unused
    def _fused(self, x: Tensor, shortcut: Tensor, readers: int) -> Any:
        """The block in fused steps.

        Args:
            x, shortcut: the block's input, as its convolutions and as its shortcut read it. Where they are two results
                of one normalisation, their gradients are added where its backward reads them.
            readers: 2 gives the output twice, in the same sense.
        """
        raise TypeError(f"{type(self).__name__}: expected a subclass that says how it is fused")

    @torch.jit.unused
    def _next(self, x: Tensor, shortcut: Tensor, readers: int) -> tuple[Tensor, Tensor]:
        """The block as one of a row (`fastres.nn.stem`): `_fused`, with the output for both readers."""
        if self._leaves(x) or self._gains_by_channels_last(x):
            y = self(x)
            return y, y
        y = self._fused(x, shortcut, readers)
        return y if readers == 2 else (y, y)

    def why_not_fusable(self) -> str | None:
        """As `Fused.why_not_fusable`; the normalisations have to use one kind of statistics, too."""
        problem = super().why_not_fusable()
        if problem is not None:
            return problem
        modules = self._modules
        batch = uses_batch_statistics(cast(nn.BatchNorm2d, modules["bn1"]))
        for name in ("bn2", "bn3") if "bn3" in self.exactly else ("bn2",):
            if uses_batch_statistics(cast(nn.BatchNorm2d, modules[name])) != batch:
                return "one of its normalisations is frozen, another is not"
        downsample = modules.get("downsample")
        if downsample is not None and any(m is modules[name] for m in downsample._modules.values()):
            # It would see two batches in another order than torchvision's.
            return "its downsample shares a normalisation with it"
        # The operators know dropout only together with the batch's statistics.
        return "its dropout acts while its normalisations are frozen" if not batch and self._dropout_now() > 0 else None

    def _fits(self, x: Tensor) -> bool:
        return fits_convolution(x, cast(nn.Conv2d, self._modules["conv1"]))

    def _dropout_now(self) -> float:
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        shown = [f"dropout={self.dropout:g}"] * (self.dropout > 0)
        shown += [f"conv_algorithm={self.conv_algorithm}"] * (self.conv_algorithm is not None)
        return ", ".join(shown)

    def _set(self, dropout: float, conv_algorithm: str | None) -> None:
        self.dropout, self.conv_algorithm = check_dropout(dropout), check_conv_algorithm(conv_algorithm)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A block pickled whole before its children were torch's own has the one attribute without the other.
        if "conv_algorithm" in self.__dict__ and "dropout" not in self.__dict__:
            self.dropout = max(take_over_norm(self, n) for n, c in self.exactly.items() if c is nn.BatchNorm2d)
            if type(self._modules.get("downsample")) is ProjectionShortcut:
                self.downsample.__class__ = nn.Sequential


def set_conv_algorithm(network: nn.Module, conv_algorithm: str | None) -> None:
    """Give every fused block of a network its `conv_algorithm`.

    Raises:
        TypeError, ValueError: as `check_conv_algorithm`.
    """
    conv_algorithm = check_conv_algorithm(conv_algorithm)
    for module in network.modules():
        if isinstance(module, FusedBlock):
            module.conv_algorithm = conv_algorithm


class FusedBasicBlock(FusedBlock, BasicBlock):  # type: ignore[misc]
    """torchvision's BasicBlock with everything between its convolutions fused.

        y = relu(bn2(conv2(dropout(relu(bn1(conv1 x))))) + shortcut(x))

    Children, parameters and state_dict are torchvision's. Where a child is hooked, or replaced by what it does not
    know, where some of the normalisations are frozen, and where the call is traced, exported or transformed, it
    computes child by child as torchvision's block does (`fastres.fuse_report` says so, and the log once).

    Args:
        inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer: as torchvision's block.
        dropout: 0 <= dropout < 1, between the convolutions.
        conv_algorithm: of the convolutions, as `fastres.fuse`. By Winograd's, in training, the block keeps for backward
            its input, the raw outputs of its convolutions, and bits.
    Raises:
        TypeError: dropout is not a number, conv_algorithm not a string or None.
        ValueError: dropout is outside [0, 1); conv_algorithm is unknown.
    """

    exactly = {  # noqa: RUF012
        "conv1": nn.Conv2d,
        "bn1": nn.BatchNorm2d,
        "relu": AnyActivation,
        "conv2": nn.Conv2d,
        "bn2": nn.BatchNorm2d,
    }
    stands_for = BasicBlock
    _plain = renamed(BasicBlock.forward, "_plain")
    _plain_with_dropout = renamed(DropoutBasicBlock.forward, "_plain_with_dropout")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        dropout: float = 0.0,
        conv_algorithm: str | None = None,
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        self._set(dropout, conv_algorithm)

    @torch.jit.unused
    def _fused(self, x: Tensor, shortcut: Tensor, readers: int) -> Any:
        algorithm, bn1, bn2, f = self.conv_algorithm, self.bn1, self.bn2, activation_of(self.relu)
        if uses_batch_statistics(bn1):
            out, statistics, same = conv_with_statistics(self.conv1, x, algorithm)
            # The convolution adds the shortcut's gradient to its own, where it can.
            shortcut = shortcut if same is x else same
            out, statistics = norm_act_conv(
                bn1, self.conv2, out, activation=f, dropout=self._dropout_now(), statistics=statistics,
                algorithm=algorithm,
            )  # fmt: skip
            return add_shortcut(
                bn2, out, shortcut, self.downsample, activation=f, statistics=statistics, readers=readers
            )
        out = conv_norm(self.conv1, bn1, x, activation=f, algorithm=algorithm)
        if self.downsample is None:
            y = conv_norm(self.conv2, bn2, out, shortcut, activation=f, algorithm=algorithm)
            return y if readers == 1 else (y, y)
        out = conv_alone(self.conv2, out, algorithm)
        return add_shortcut(bn2, out, shortcut, self.downsample, activation=f, readers=readers)


class FusedBottleneck(FusedBlock, Bottleneck):  # type: ignore[misc]
    """torchvision's Bottleneck, fused around the convolutions; dropout stands after the ReLU of bn2.

    By our convolutions in one group, in training, it keeps for backward its input, their raw outputs, and bits.

    Args, Raises: as `FusedBasicBlock`, of which the rest holds as well.
    """

    exactly = {  # noqa: RUF012
        **FusedBasicBlock.exactly,
        "conv3": nn.Conv2d,
        "bn3": nn.BatchNorm2d,
    }
    stands_for = Bottleneck
    _plain = renamed(Bottleneck.forward, "_plain")
    _plain_with_dropout = renamed(DropoutBottleneck.forward, "_plain_with_dropout")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        dropout: float = 0.0,
        conv_algorithm: str | None = None,
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        self._set(dropout, conv_algorithm)

    @torch.jit.unused
    def _fused(self, x: Tensor, shortcut: Tensor, readers: int) -> Any:
        algorithm, bn1, bn2, f = self.conv_algorithm, self.bn1, self.bn2, activation_of(self.relu)
        if uses_batch_statistics(bn1):
            out, statistics, same = conv_with_statistics(self.conv1, x, algorithm)
            # The convolution adds the shortcut's gradient to its own, where it can.
            shortcut = shortcut if same is x else same
            out, statistics = norm_act_conv(
                bn1, self.conv2, out, activation=f, dropout=0.0, statistics=statistics, algorithm=algorithm
            )
            out, statistics = norm_act_conv(
                bn2, self.conv3, out, activation=f, dropout=self._dropout_now(), statistics=statistics,
                algorithm=algorithm,
            )  # fmt: skip
            return add_shortcut(
                self.bn3, out, shortcut, self.downsample, activation=f, statistics=statistics, readers=readers
            )
        out = norm_act(bn1, self.conv1(x), activation=f)
        out = self.conv3(conv_norm(self.conv2, bn2, out, activation=f, algorithm=algorithm))
        return add_shortcut(self.bn3, out, shortcut, self.downsample, activation=f, readers=readers)


class PlainResidualBlock(nn.Module):
    """`ResidualBlock` in plain PyTorch: the same arguments (but conv_algorithm), children, parameters and results."""

    expansion = 1
    _skip_class = PlainSkipConnection

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = check_dropout(dropout)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = self._skip_class(in_channels, out_channels, stride) if changes else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu(self.bn1(self.conv1(x)))
        if self.dropout > 0.0:
            out = F.dropout(out, self.dropout, self.training)
        return self.bn2(self.conv2(out + self.shortcut(x)))  # type: ignore[no-any-return]


class ResidualBlock(FusedBlock, PlainResidualBlock):
    """The residual block that adds its input before the second convolution.

        y = bn2(conv2(dropout(relu(bn1(conv1 x))) + shortcut(x)))

    Both convolutions are 3x3 without bias, the first with the stride. The shortcut is the identity where shapes agree
    and a `SkipConnection` where channels or stride change. Nothing follows bn2. The children are torch's own, and the
    fused steps are taken where each is what its class says and no more, as in `FusedBasicBlock`.

    Args:
        in_channels, out_channels: of the block.
        stride: of the first convolution and of the shortcut.
        dropout: 0 <= dropout < 1; it acts where the block is in training mode.
        conv_algorithm: as `FusedBasicBlock`.
    Raises:
        TypeError: dropout is not a number, conv_algorithm not a string or None.
        ValueError: dropout is outside [0, 1); conv_algorithm is unknown.
    """

    exactly = FusedBasicBlock.exactly
    _skip_class = SkipConnection
    _plain = renamed(PlainResidualBlock.forward, "_plain")
    _plain_with_dropout = renamed(PlainResidualBlock.forward, "_plain_with_dropout")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dropout: float = 0.5,
        *,
        conv_algorithm: str | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, dropout)
        self._set(dropout, conv_algorithm)

    @torch.jit.unused
    def _fused(self, x: Tensor, shortcut: Tensor, readers: int) -> Any:
        algorithm, bn1, bn2, f = self.conv_algorithm, self.bn1, self.bn2, activation_of(self.relu)
        if uses_batch_statistics(bn1):
            out, statistics, same = conv_with_statistics(self.conv1, x, algorithm)
            shortcut = shortcut if same is x else same
            out, statistics = norm_act_conv(
                bn1, self.conv2, out, self.shortcut(shortcut), activation=f, dropout=self._dropout_now(),
                order="act_add", statistics=statistics, algorithm=algorithm,
            )  # fmt: skip
            return norm_act(bn2, out, activation=IDENTITY, statistics=statistics, readers=readers)
        out = conv_alone(self.conv1, x, algorithm)
        out = norm_act(bn1, out, self.shortcut(shortcut), activation=f, order="act_add")
        y = conv_norm(self.conv2, bn2, out, activation=IDENTITY, algorithm=algorithm)
        return y if readers == 1 else (y, y)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "relu" not in self._modules:  # pickled whole before its children were torch's own
            self.relu = nn.ReLU(inplace=True)
