"""Shortcuts that change channels or resolution: a strided 1x1 convolution and its batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch.nn as nn
from torch import Tensor

from fastres import functional
from fastres.functional import Statistics
from fastres.nn.norm import FusedBatchNormAct2d, count_batch, known, read_norm
from fastres.nn.obstacles import has_hooks, obstacle

if TYPE_CHECKING:
    from typing_extensions import Self


def _conv_obstacle(conv: nn.Module) -> str | None:
    problem = obstacle(conv, nn.Conv2d)
    if problem is not None:
        return problem
    assert isinstance(conv, nn.Conv2d)
    if conv.bias is not None:
        return "has a bias"
    if conv.kernel_size != (1, 1) or conv.padding not in ((0, 0), "valid") or conv.groups != 1:
        return f"is not a 1x1 convolution without padding and groups, but {conv}"
    return None


def projection_obstacle(downsample: nn.Module) -> str | None:
    """Why a downsample is not exactly a 1x1 convolution and BatchNorm2d that may be one step; None where it is."""
    return obstacle(downsample, nn.Sequential) or _children_obstacle(downsample, nn.BatchNorm2d)


def _children(shortcut: nn.Sequential) -> tuple[nn.Conv2d, FusedBatchNormAct2d]:
    """The convolution and the normalisation, once `_children_obstacle` has said that they are."""
    return cast("tuple[nn.Conv2d, FusedBatchNormAct2d]", tuple(shortcut.children()))


def _children_obstacle(shortcut: nn.Module, norm_class: type[nn.Module]) -> str | None:
    children = list(shortcut.children())
    if len(children) != 2:
        return f"has {len(children)} children, expected a convolution and a normalisation"
    conv, norm = children
    problem = _conv_obstacle(conv)
    if problem is not None:
        return f"its convolution {problem}"
    problem = obstacle(norm, norm_class)
    return None if problem is None else f"its normalisation {problem}"


class ProjectionShortcut(nn.Sequential):
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

    @classmethod
    def adopt(cls, downsample: nn.Sequential) -> Self:
        """Turn a torchvision `downsample` itself into one of these; `projection_obstacle` says whether it can be."""
        problem = projection_obstacle(downsample)
        if problem is not None:
            raise ValueError(f"downsample: expected a 1x1 convolution and BatchNorm2d, but it {problem}")
        downsample.__class__ = cls
        assert isinstance(downsample, cls)
        return downsample

    def release(self) -> nn.Sequential:
        """The way back from `adopt`: this object as a plain torch.nn.Sequential."""
        self.__class__ = nn.Sequential  # type: ignore[assignment]
        return self

    def forward(
        self,
        s: Tensor,
        x: Tensor | None = None,
        norm: nn.Module | None = None,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """bn(conv1x1(s)); with `x` and `norm`: norm's activation of norm(x) + bn(conv1x1(s)).

        Where they cannot be one step (one of the two normalisations is frozen, somebody registered a hook on the
        convolution, ...) the same is computed as norm(x, bn(conv1x1(s))).

        Args:
            s: [N, Cin, H, W], the block's input.
            x: [N, Cout, ceil(H / stride), ceil(W / stride)], the last convolution of the main branch.
            norm: FusedBatchNormAct2d or BatchNormAct2d, the normalisation of x.
            statistics: those of x where they are known already and norm uses them.
        Returns:
            [N, Cout, ceil(H / stride), ceil(W / stride)].
        Raises:
            TypeError: one of x and norm without the other, or statistics without them.
            TypeError, ValueError: as `fastres.functional.projection_shortcut`.
        """
        if x is None and norm is None:
            if statistics is not None:
                raise TypeError(f"statistics: expected None without x and norm, got {type(statistics).__name__}")
            return super().forward(s)  # type: ignore[no-any-return, no-untyped-call]
        if x is None or norm is None:
            raise TypeError(
                f"x and norm: expected both or neither, got {'x' if norm is None else 'norm'} without the other"
            )
        if not self._is_one_step_with(norm):
            return norm(x, super().forward(s), **known(statistics))  # type: ignore[no-any-return, no-untyped-call]
        conv, own = _children(self)
        main = cast(FusedBatchNormAct2d, norm)
        params, batch_statistics = read_norm(own)
        main_params, _ = read_norm(main)
        y = functional.projection_shortcut(
            s, conv.weight, params, x, main_params, stride=cast("tuple[int, int]", conv.stride),
            training=batch_statistics, relu=main.relu, dropout_p=main.dropout if main.training else 0.0,
            x_statistics=statistics,
        )  # fmt: skip
        count_batch(own)
        count_batch(main)
        return y

    def _is_one_step_with(self, norm: nn.Module) -> bool:
        if obstacle(norm, FusedBatchNormAct2d) is not None or _children_obstacle(self, nn.BatchNorm2d) is not None:
            return False
        _, own = _children(self)
        same_mode = norm.training == own.training
        same_statistics = norm.training or (norm.running_mean is None) == (own.running_mean is None)
        return norm.order == "add_act" and same_mode and same_statistics


def add_shortcut(
    norm: Callable[..., Tensor],
    x: Tensor,
    s: Tensor,
    downsample: nn.Module | None,
    statistics: Statistics | None = None,
) -> Tensor:
    """The end of a residual block: norm's activation of norm(x) + downsample(s), with downsample None the identity.

    `statistics` are those of x where they are known already and norm uses them.
    """
    if isinstance(downsample, ProjectionShortcut) and not has_hooks(downsample):
        return downsample(s, x, norm, **known(statistics))  # type: ignore[no-any-return]
    return norm(x, s if downsample is None else downsample(s), **known(statistics))


class SkipConnection(nn.Sequential):
    """A 1x1 convolution with stride, batch normalisation and ReLU: how a block's input reaches an addition whose shape
    differs.

    Args:
        in_channels, out_channels: of the convolution.
        stride: of the convolution, both axes.
    The convolution is child "0", the normalisation, a FusedBatchNormAct2d, child "1".
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
            FusedBatchNormAct2d(out_channels),
        )

    def forward(self, s: Tensor) -> Tensor:
        """relu(bn(conv1x1(s))).

        Args:
            s: [N, Cin, H, W].
        Returns:
            [N, Cout, ceil(H / stride), ceil(W / stride)].
        Raises:
            TypeError, ValueError: as `fastres.functional.projection_shortcut`.
        """
        if _children_obstacle(self, FusedBatchNormAct2d) is not None:
            return super().forward(s)  # type: ignore[no-any-return, no-untyped-call]
        conv, norm = _children(self)
        params, batch_statistics = read_norm(norm)
        y = functional.projection_shortcut(
            s, conv.weight, params, stride=cast("tuple[int, int]", conv.stride), training=batch_statistics,
            relu=norm.relu, dropout_p=norm.dropout if norm.training else 0.0,
        )  # fmt: skip
        count_batch(norm)
        return y
