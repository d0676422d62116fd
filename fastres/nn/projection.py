"""The projection shortcut as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fastres import functional
from fastres.nn.batch_norm_act import BatchNormAct2d, norm_params, uses_batch_statistics


class ProjectionShortcut(nn.Sequential):
    """1x1 convolution with stride and batch normalisation, fused with the addition and the ReLU that follow.

    Its children are "0", the convolution, and "1", the normalisation: state_dict is that of torchvision's `downsample`.

    Args:
        in_channels, out_channels, stride: of the convolution, which has no bias.
    Source: He et al. 2015, equation 2 and option B.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, s: Tensor, x: Tensor | None = None, norm: BatchNormAct2d | None = None) -> Tensor:  # type: ignore[override]
        """bn(conv(s)), or with the main branch x: relu(norm(x) + bn(conv(s))), then norm's dropout.

        Args:
            s: [N, Cin, H, W], the block's input.
            x: [N, Cout, ceil(H / stride), ceil(W / stride)], the main branch.
            norm: the main branch's own normalisation, order "add_act"; None adds x as it is.
        Returns:
            [N, Cout, ceil(H / stride), ceil(W / stride)].
        """
        if x is None:
            return super().forward(s)
        conv, bn = self[0], self[1]
        batch_statistics = uses_batch_statistics(bn)
        if norm is not None and uses_batch_statistics(norm) != batch_statistics:
            # One of the two is frozen: one pass has one kind of statistics.
            return norm(x, super().forward(s))  # type: ignore[no-any-return]
        return functional.projection_shortcut(
            s,
            conv.weight,
            norm_params(bn),
            x,
            None if norm is None else norm_params(norm),
            stride=conv.stride,
            training=batch_statistics,
            relu=norm is None or norm.relu,
            dropout_p=norm.dropout if norm is not None and norm.training else 0.0,
        )
