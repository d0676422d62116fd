"""What the algorithms of a convolution cost, by processor. docs/convolution.md has the measurements behind it."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """A form of Winograd's algorithm.

    Attributes:
        side: outputs of a tile's side.
        products: a tile and pair of channels.
        tile: the transforms of a tile, a channel.
        weight: the transform of a pair of channels.
        shared: tiles times channels, and pairs of channels, that shared caches hold when they are transformed; 0 where
            that does not matter.
        beyond: percent of products in inference when they hold neither.
    """

    side: int
    products: int
    tile: int
    weight: int
    shared: int = 0
    beyond: int = 100


class Winograd(NamedTuple):
    """Winograd's algorithm.

    Attributes:
        lanes: of a vector. Inputs and outputs are rounded up to it.
        call: one call.
        forms: by stride. csrc/cpu/winograd.h chooses between those of stride 1.
    """

    lanes: int
    call: int
    forms: dict[int, tuple[Form, ...]]


class Direct(NamedTuple):
    """A direct sum, which takes 18 a pair of channels and output position.

    Attributes:
        columns: outputs are rounded up to it.
        output: an element of the output.
        weight: a pair of channels.
        call: one call.
        norm: an element of the output, to normalise and activate it in a pass of its own.
        few: output positions up to which it is faster than PyTorch's convolution in inference.
        percent: of all of it.
        unfilled: the same in training, where images have few outputs each.
        pairs: the same of bfloat16 numbers that are multiplied in pairs.
    """

    columns: int = 1
    output: int = 0
    weight: int = 0
    call: int = 0
    norm: int = 0
    few: int = 0
    percent: int = 100
    unfilled: int = 100
    pairs: int = 100


class Costs(NamedTuple):
    """In operations of the inner loop of PyTorch's convolution.

    Attributes:
        winograd: of Winograd's algorithm.
        direct: by stride, of the direct sum that it is compared with.
        few_small: images, of few pixels each, up to which that sum is faster than the one that leaves out taps outside.
    """

    winograd: Winograd
    direct: dict[int, Direct]
    few_small: int = 1


_AVX512 = Winograd(
    16,
    1_000_000,
    {
        1: (Form(3, 50, 1050, 420), Form(4, 72, 1600, 600), Form(5, 98, 2400, 720)),
        2: (Form(4, 162, 3500, 1300, 30_000, 165),),
    },
)
_AVX512_PACKED = Winograd(
    16,
    1_000_000,
    {
        1: (Form(3, 50, 1050, 340), Form(4, 72, 1600, 470), Form(5, 98, 2400, 660)),
        2: (Form(4, 162, 3500, 1200),),
    },
)
# Of bfloat16 numbers that PyTorch's convolution multiplies two at a time; ours are float32's.
_AVX512_PAIRS = Winograd(16, 1_000_000, {1: (Form(3, 50, 640, 420), Form(4, 72, 850, 600), Form(5, 98, 1300, 720))})
_AVX2 = Winograd(
    8,
    9_000_000,
    {
        1: (Form(3, 55, 890, 810), Form(4, 89, 1360, 810), Form(5, 122, 2000, 1100)),
        2: (Form(4, 172, 2900, 1300, 50_000, 155),),
    },
)
_AVX2_FEW = Winograd(
    8,
    7_000_000,
    {1: (Form(3, 80, 400, 530), Form(4, 105, 340, 760), Form(5, 143, 500, 1000)), 2: (Form(4, 232, 0, 1130),)},
)
_AVX2_PACKED = Winograd(
    8,
    1_300_000,
    {
        1: (Form(3, 62, 750, 330), Form(4, 89, 1140, 480), Form(5, 122, 1700, 650)),
        2: (Form(4, 172, 3500, 1250),),
    },
)
_AVX2_GEMM = Direct(output=250, weight=124, call=6_300_000, few=256)
_AVX2_PACKED_GEMM = Direct(16, 110, 110, 1_600_000)
# By capability and what it is compared with: PyTorch's convolution, "gemm" of few positions, and "gemm" in inference
# with packed weights.
COSTS = {
    "avx512": {
        "torch": Costs(
            _AVX512, {1: Direct(16, 50, 1000, norm=200), 2: Direct(weight=1150, call=5_000_000, norm=200, unfilled=110)}
        ),
        "gemm": Costs(_AVX512, {1: Direct(16, 50, 250, norm=200, few=256), 2: Direct(weight=250, norm=200, few=128)}),
        "packed": Costs(_AVX512_PACKED, {1: Direct(16, 50, 55, pairs=65), 2: Direct(16, 50, 55, pairs=50)}, 4),
        "pairs": Costs(_AVX512_PAIRS, {1: Direct(norm=200, unfilled=50, pairs=50)}),
    },
    "avx2": {
        "torch": Costs(
            _AVX2, {1: Direct(8, 40, 420, 16_000_000, 100, unfilled=200), 2: Direct(8, 220, 630, 16_000_000, 100)}
        ),
        "gemm": Costs(_AVX2_FEW, {1: _AVX2_GEMM, 2: _AVX2_GEMM}, 4),
        "packed": Costs(_AVX2_PACKED, {1: _AVX2_PACKED_GEMM, 2: _AVX2_PACKED_GEMM}, 4),
    },
}


class Groups(NamedTuple):
    """What differs in groups.

    Attributes:
        widest, widest_training: channels of a group up to which the direct sum of our own is faster than PyTorch's
            convolution; of 3x3 kernels in training.
        few: output positions from which on that holds, but in the narrowest groups: fewer do not pay for packing the
            weights.
        percent: PyTorch's convolution in training, of what its multiplications take in one group.
        weight: a pair of channels in PyTorch's convolution.
        call: Winograd's algorithm for one group.
    """

    widest: int
    widest_training: int
    few: int
    percent: int
    weight: int
    call: int


GROUPS = {"avx512": Groups(32, 32, 128, 100, 0, 20_000_000), "avx2": Groups(32, 64, 48, 125, 420, 9_000_000)}
