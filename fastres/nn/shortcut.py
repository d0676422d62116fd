"""Shortcuts that change channels or resolution: a strided 1x1 convolution and its batch normalisation."""

from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastres.nn.norm import FusedBatchNormAct2d
from fastres.nn.steps import fits_convolution, projection, projects_beside, why_not_projection
from fastres.nn.trust import AnyActivation, Fused, activation_of, is_exactly, renamed, why_not_ordinary


class ProjectionShortcut(Fused, nn.Sequential):
    """The projection shortcut of a residual block (He et al. 2015, option B), built like torchvision's `downsample`.

    Called with the block's input alone it is bn(conv1x1(s)), as there. Called with the main branch and its
    normalisation it closes the block: the statistics of the product are gathered while the convolution writes it, and
    both normalisations, the addition and the ReLU take one pass.

    Args:
        in_channels, out_channels: of the 1x1 convolution.
        stride: of the convolution, both axes.
    The convolution is child "0", the normalisation child "1", as in torchvision's state_dict.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    _plain = renamed(nn.Sequential.forward, "_plain")

    # TorchScript knows no modules as arguments.
    def forward(self, s: Tensor, x: Tensor | None = None, norm: Any = None) -> Tensor:
        """bn(conv1x1(s)); with `x` and `norm`: norm's activation of norm(x) + bn(conv1x1(s)).

        Where they cannot be one step (one of the two normalisations is frozen, somebody registered a hook on the
        convolution, ...) the same is computed as norm(x, bn(conv1x1(s))).

        Args:
            s: [N, Cin, H, W], the block's input.
            x: [N, Cout, ceil(H / stride), ceil(W / stride)], the last convolution of the main branch.
            norm: FusedBatchNormAct2d or BatchNormAct2d, the normalisation of x.
        Returns:
            [N, Cout, ceil(H / stride), ceil(W / stride)].
        Raises:
            TypeError: one of x and norm without the other.
            TypeError, ValueError: as `fastres.functional.projection_shortcut`.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._plain(s)  # type: ignore[no-any-return]
        return self._close(s, x, norm)

    @torch.jit.unused
    def _close(self, s: Tensor, x: Tensor | None, norm: Any) -> Tensor:
        if x is None and norm is None:
            return self._plain(s)  # type: ignore[no-any-return]
        if x is None or norm is None:
            raise TypeError(
                f"x and norm: expected both or neither, got {'x' if norm is None else 'norm'} without the other"
            )
        if not is_exactly(norm, FusedBatchNormAct2d) or not self._is_one_step_with(norm, s, x):
            return norm(x, self._plain(s))  # type: ignore[no-any-return]
        dropout = norm.dropout if norm.training else 0.0
        return projection(  # type: ignore[no-any-return]
            self, s, cast(nn.BatchNorm2d, norm.norm), x, dropout=dropout, activation=activation_of(norm.act)
        )

    def why_not_fusable(self) -> str | None:
        """Why its children are not one step; None where they are."""
        return super().why_not_fusable() or _why_not_children_alone(self, 2) or why_not_projection(self)

    def _fits(self, x: Tensor) -> bool:
        return fits_convolution(x, cast(nn.Conv2d, self._modules["0"]))

    def _is_one_step_with(self, norm: FusedBatchNormAct2d, s: Tensor, x: Tensor) -> bool:
        return (
            norm.order == "add_act"
            and not self._leaves(s)
            and why_not_ordinary(x) is None
            and norm.why_not_fusable() is None
            and projects_beside(cast(nn.BatchNorm2d, norm.norm), x, self, s)
        )


def _why_not_children_alone(shortcut: nn.Sequential, count: int) -> str | None:
    names = list(shortcut._modules)
    return None if names == [str(i) for i in range(count)] else f"it has the children {names}"


class PadShortcut(nn.Module):
    """A shortcut without parameters (He et al. 2015, option A): every stride-th pixel, and zeros in the new channels.

    Args:
        extra_channels: channels of zeros behind those of the input.
        stride: both axes.
    """

    def __init__(self, extra_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.extra_channels, self.stride = extra_channels, stride

    def forward(self, s: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C + extra_channels, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(s[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


class PlainSkipConnection(nn.Sequential):
    """`SkipConnection` in plain PyTorch: the same arguments, children, parameters and results."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class SkipConnection(Fused, PlainSkipConnection):
    """A 1x1 convolution with stride, batch normalisation and ReLU: how a block's input reaches an addition whose shape
    differs.

    Args:
        in_channels, out_channels: of the convolution.
        stride: of the convolution, both axes.
    The children "0", "1" and "2" are torch's own: convolution, BatchNorm2d, ReLU.
    """

    exactly = {"2": AnyActivation}  # noqa: RUF012
    _plain = renamed(nn.Sequential.forward, "_plain")

    def forward(self, s: Tensor) -> Tensor:
        """relu(bn(conv1x1(s))).

        Args:
            s: [N, Cin, H, W].
        Returns:
            [N, Cout, ceil(H / stride), ceil(W / stride)].
        Raises:
            TypeError, ValueError: as `fastres.functional.projection_shortcut`.
        """
        if torch.jit.is_scripting() or self._leaves(s):  # type: ignore[attr-defined]
            return self._plain(s)  # type: ignore[no-any-return]
        return self._fused(s)

    def _fits(self, x: Tensor) -> bool:
        return fits_convolution(x, cast(nn.Conv2d, self._modules["0"]))

    @torch.jit.unused
    def _fused(self, s: Tensor) -> Tensor:
        weight = cast(nn.Conv2d, self[0]).weight
        channels = weight.shape[1]
        if channels > 1 and weight.stride()[1:] == (1, channels, channels):
            # PyTorch's convolutions tell a 1x1 weight in channels_last by its strides, and give channels_last for it.
            s = s.contiguous(memory_format=torch.channels_last)
        return projection(self, s, activation=activation_of(self[2]))  # type: ignore[no-any-return]

    def why_not_fusable(self) -> str | None:
        """Why its children are not one step; None where they are."""
        return super().why_not_fusable() or _why_not_children_alone(self, 3) or why_not_projection(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        norm = self._modules.get("1")
        if len(self) == 2 and type(norm) is FusedBatchNormAct2d:  # pickled whole when its normalisation held the ReLU
            self._modules["1"] = norm.norm
            self.append(nn.ReLU(inplace=True))
