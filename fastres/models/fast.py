"""A plain network without shortcuts that learns CIFAR-10 in minutes."""

import torch
import torch.nn as nn
from torch import Tensor

from fastres.models.stem import check_head, check_width, scaled
from fastres.nn.pooled import PooledBlock

_PATCH = 2
_WHITENING_CHANNELS = 2 * 3 * _PATCH * _PATCH


class FastNet(nn.Module):
    """A whitening convolution, three `fastres.nn.PooledBlock`, the maximum over space and a linear layer.

        f = block3(block2(block1(gelu(whitening x))))
        logits = fc(max over space of f) / 9

    The whitening is a 2x2 convolution without padding. Its filters are no trained parameters: `set_whitening` computes
    them from training images, once, before training; until then they are random. Its bias is trained. Every
    convolution of a block begins as the identity of its input on the first of its channels.

    `fastres.unfuse` makes of the blocks their plain twins, and nothing of the network itself.

    Args:
        num_classes: outputs.
        stem: "cifar", the only one: the network is for small images.
        dropout: 0 <= dropout < 1, after each block.
        conv_algorithm: of the blocks' convolutions, as `fastres.fuse`.
        width: multiplier of the blocks' 64, 256 and 256 channels, which are rounded to multiples of 8.
    Input: [N, 3, H, W], H and W at least 9. Output: [N, num_classes], logits.
    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
    Source: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", sections 2 and 3.
    """

    # A side in pixels: the whitening takes one off, and three pools halve what is left.
    smallest_image = 9
    __constants__ = ["smallest_image"]  # noqa: RUF012

    def __init__(
        self,
        num_classes: int = 10,
        *,
        stem: str = "cifar",
        dropout: float = 0.0,
        conv_algorithm: str | None = None,
        width: float = 1.0,
    ) -> None:
        check_head(num_classes, stem)
        if stem != "cifar":
            raise ValueError(f"stem: expected 'cifar', the only one of this network, got {stem!r}")
        widths = [scaled(c, check_width(width)) for c in (64, 256, 256)]
        super().__init__()
        self.whitening = nn.Conv2d(3, _WHITENING_CHANNELS, kernel_size=_PATCH)
        self.whitening.weight.requires_grad_(False)
        self.whitening.bias = nn.Parameter(torch.zeros(_WHITENING_CHANNELS))
        self.act = nn.GELU()
        channels = (_WHITENING_CHANNELS, *widths)
        self.block1, self.block2, self.block3 = (
            # 0.4 and 1e-12 are the source's: the running statistics follow weights that change fast.
            PooledBlock(i, o, dropout=dropout, eps=1e-12, momentum=0.4, conv_algorithm=conv_algorithm)
            for i, o in zip(channels, widths, strict=False)
        )
        self.maxpool = nn.AdaptiveMaxPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], num_classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.whitening:
                with torch.no_grad():
                    nn.init.dirac_(module.weight[: module.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, num_classes].

        Raises:
            ValueError: H or W is below 9.
        """
        if x.shape[-2] < self.smallest_image or x.shape[-1] < self.smallest_image:
            sides = f"{x.shape[-2]} x {x.shape[-1]}"
            raise ValueError(f"x: expected at least {self.smallest_image} pixels a side, got {sides}")
        features = self.block3(self.block2(self.block1(self.act(self.whitening(x)))))
        return self.fc(torch.flatten(self.maxpool(features), 1)) / 9  # type: ignore[no-any-return]

    @torch.no_grad()
    def set_whitening(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the first convolution's filters to those that whiten the 2x2 patches of these images.

        With e_i and s_i the eigenvectors and eigenvalues of E[p p^T], p a patch, the filters are e_i / sqrt(s_i + eps)
        and their negatives, from the smallest s_i to the largest. The sign of an eigenvector makes its largest element
        positive, so that the filters do not depend on the library behind torch.linalg.

        Args:
            images: [N, 3, H, W], as the network will see them (normalised), in floating point; some thousands suffice.
            eps: added to the eigenvalues; it bounds how far directions without variance are magnified.
        Raises:
            TypeError: images is not a tensor in floating point.
            ValueError: images has another shape, none or too few pixels, or values that are not finite; eps is not
                positive.
        Source: Jordan 2024, section 3.2; Page 2018, "How to train your ResNet", part 8.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a tensor in floating point, got {kind}")
        if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0 or min(images.shape[2:]) < _PATCH:
            raise ValueError(f"images: expected [N, 3, H, W], H and W at least {_PATCH}, got {tuple(images.shape)}")
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        rows = images.unfold(2, _PATCH, 1).unfold(3, _PATCH, 1)  # [N, 3, H - 1, W - 1, 2, 2]
        patches = rows.permute(0, 2, 3, 1, 4, 5).reshape(-1, _WHITENING_CHANNELS // 2).double()
        moment = patches.T @ patches / len(patches)
        if not bool(moment.isfinite().all()):
            raise ValueError("images: expected finite values, got infinities or NaN")
        values, vectors = torch.linalg.eigh(moment)
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        filters = (vectors / torch.sqrt(values.clamp(min=0) + eps)).T.reshape(-1, 3, _PATCH, _PATCH)
        self.whitening.weight.copy_(torch.cat((filters, -filters)))
