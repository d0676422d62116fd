"""What every backend agrees on: the order of memory, the bit mask, dropout's random numbers, dtypes, and the groups in
which arguments travel.

The contract holds for csrc/, kernels/ and the fallback alike: a mask, a seed or statistics that one of them made can be
read by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.activations import KINDS, Activation

ORDERS = ("add_act", "act_add")

# ----------------------------------------------------------------------------------------------------- argument groups


class NormParams(NamedTuple):
    """Everything that one batch normalisation owns: [C] tensors, and the constants of torch.nn.BatchNorm2d.

    Attributes:
        running_mean, running_var: [C], updated in place in training; None where no running statistics are kept.
        weight, bias: [C]; None means 1 and 0.
        momentum: share of the new batch in the running statistics.
        eps: added to the variance.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5


class Statistics(NamedTuple):
    """The batch statistics of a tensor, where somebody has taken them already.

    Attributes:
        mean: [C], float32 (float64 for float64).
        m2: [C], the sum of squared deviations from the mean.
        count: int64 [1], elements a channel that they were taken of; None: those of the tensor that they come with.
    """

    mean: Tensor
    m2: Tensor
    count: Tensor | None = None  # type: ignore[assignment]

    @classmethod
    def combined(cls, parts: Sequence[Statistics]) -> Statistics:
        """Those of the union of samples whose statistics, with counts, are given.

        Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
        """
        means, m2s = (torch.stack([part[i] for part in parts]) for i in range(2))  # type: ignore[misc]
        counts = [part.count for part in parts]
        if any(count is None for count in counts):
            raise ValueError("parts: expected statistics with the count of elements a channel, got None")
        return cls.of_parts(means, m2s, torch.stack(counts))  # type: ignore[arg-type]

    @classmethod
    def of_parts(cls, means: Tensor, m2s: Tensor, counts: Tensor) -> Statistics:
        """`combined` of parts that lie in one tensor: means and m2s [P, C], counts int64 [P, 1]. A part may be empty.

        In float64, so that a mean far from 0 costs no precision.
        """
        total, exact = counts.sum(0), means.double()
        mean = (exact * (counts.double() / total)).sum(0)
        m2 = (m2s.double() + counts * (exact - mean) ** 2).sum(0)
        return cls(mean.to(means.dtype), m2.to(m2s.dtype), total)


class Group(NamedTuple):
    """Processes whose batches are normalised as one: a process group of torch.distributed.

    Attributes:
        name: what its functional collectives are called with.
        size: its number of processes.
    """

    name: str
    size: int


class Norm(NamedTuple):
    """A normalisation by given statistics: z = weight * (x - mean) * rstd + bias, [C] each; None means 1 and 0."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Residual(NamedTuple):
    """What is added, [N, C, H, W], with its own normalisation where it has one (then `mean` is not None)."""

    value: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def norm(self) -> Norm | None:
        if self.mean is None or self.rstd is None:
            return None
        return Norm(self.mean, self.rstd, self.weight, self.bias)


class Sums(NamedTuple):
    """The sums of the backward pass over a batch, [C] each: of g * xhat and of g, and the same of a residual that has a
    normalisation of its own.
    """

    dweight: Tensor
    dbias: Tensor
    residual_dweight: Tensor | None = None
    residual_dbias: Tensor | None = None


class Act(NamedTuple):
    """What happens to z: activation, dropout with rate `dropout_p`, and on which side of them the residual is added.

    "add_act":  y = dropout(f(z + r))               "act_add":  y = dropout(f(z)) + r
    """

    kind: str
    alpha: float
    dropout_p: float
    order: str

    @property
    def activation(self) -> Activation:
        return Activation(self.kind, self.alpha)

    @property
    def gated(self) -> bool:
        """Whether one bit an element, kept by dropout and passed by the activation, says all that backward needs."""
        kind = KINDS[self.kind]
        return kind.passes is not None and not (kind.leaks and self.dropout_p > 0)

    @property
    def leak(self) -> float:
        """The gradient's factor where the bit of a gated activation is not set."""
        return self.alpha if KINDS[self.kind].leaks else 0.0

    def saves_bits(self, has_residual: bool) -> bool:
        """Whether backward cannot tell from x alone what it needs to know, or from x and the residual with dropout."""
        return self.dropout_p > 0 or (self.gated and has_residual and self.order == "add_act")

    def recomputes(self, has_bits: bool) -> bool:
        """Whether backward computes the activation's input again."""
        return self.kind != "identity" and not (self.gated and has_bits)

    def reads_residual(self) -> bool:
        """Whether backward reads a residual that has no normalisation of its own: its value is part of f's input."""
        return self.order == "add_act" and self.kind != "identity" and not self.gated


def passes(act: Act, z: Tensor) -> Tensor:
    """Where a gated activation passes the gradient on as it is; bool, shaped as z."""
    gate = KINDS[act.kind].passes
    assert gate is not None
    return gate(z, act.alpha)


# What follows a gradient to which the activation's derivative has been applied already.
PLAIN = Act("identity", 0.0, 0.0, "add_act")


class ConvProblem(NamedTuple):
    """All that the choice of a convolution's algorithm depends on; padding is half the dilated kernel.

    Attributes:
        dtype: of the input.
        shape: [N, C, H, W], of the input.
        outputs: channels of the output.
        kernel, stride: of both axes.
        channels_last: whether the input's memory is walked as rows of channels.
        needs_grad: whether backward will follow.
        threads: of the CPU.
        capability: "default", "avx2" or "avx512", or "cuda".
        matrix_units: the CPU multiplies bfloat16 matrices (AMX).
        followed: a normalisation by running statistics follows, which kernels of our own apply in their epilogue.
        groups: of the channels, inputs and outputs.
        dilation: of both axes.
        pairs: the CPU multiplies bfloat16 numbers two at a time (AVX512_BF16), in twice the speed of float32.
    """

    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    outputs: int
    kernel: int
    stride: int
    channels_last: bool
    needs_grad: bool
    threads: int
    capability: str
    matrix_units: bool
    followed: bool = False
    groups: int = 1
    dilation: int = 1
    pairs: bool = False

    def phases(self) -> ConvProblem:
        """The problem without dilation that `fastres.functional.phases` makes of one with stride 1."""
        n, c, h, w = self.shape
        rows, columns = (-(-size // self.dilation) for size in (h, w))
        return self._replace(shape=(n * self.dilation**2, c, rows, columns), dilation=1)


class Pool(NamedTuple):
    """Square windows of a pooling, as torch.nn.MaxPool2d has them, without dilation or ceil_mode.

    Attributes:
        kernel, stride, padding: of both axes.
    """

    kernel: int
    stride: int
    padding: int

    @classmethod
    def of(cls, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Pool | None:
        """The windows that torch.nn.functional.max_pool2d takes these for; None for windows of another kind."""
        sides: list[int] = []
        for given in (kernel_size, kernel_size if stride in (None, [], ()) else stride, padding, dilation):
            both = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
            if len(both) != 2 or any(type(side) is not int for side in both) or both[0] != both[1]:
                return None
            sides.append(both[0])
        pool = cls(*sides[:3])
        return pool if pool.kernel > 0 and pool.stride > 0 and pool.padding >= 0 and sides[3] == 1 else None

    def output_size(self, size: int) -> int:
        """Output positions along one axis."""
        return max(0, (size + 2 * self.padding - self.kernel) // self.stride + 1)

    def fits(self, height: int, width: int) -> bool:
        """Whether there is a window in an image of these sizes, with its padding, and an element of it in each."""
        return self.padding <= self.kernel // 2 and min(height, width) + 2 * self.padding >= self.kernel


class ConvShape(NamedTuple):
    """A convolution with a square kernel.

    Attributes:
        outputs: channels of the output.
        kernel, stride, padding: of both axes.
    """

    outputs: int
    kernel: int
    stride: int
    padding: int

    def output_size(self, size: int) -> int:
        """Output positions along one axis."""
        return Pool(self.kernel, self.stride, self.padding).output_size(size)


# -------------------------------------------------------------------------------------------------------------- dropout

PHILOX_ROUND_A, PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_A, PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def _multiply_32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for unsigned 32-bit values held in int64."""
    product = a * b  # wraps modulo 2**64, which leaves all 64 bits right
    return (product >> 32) & _WORD, product & _WORD


def philox_4x32(seed: Tensor, counter: Tensor) -> Tensor:
    """Philox-4x32-10 with counter (i, 0, 0, 0).

    Args:
        seed: int64, one element; its low and high words are the key.
        counter: int64 [K], each below 2**32.
    Returns:
        int64 [K, 4], unsigned 32-bit words.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    seed = seed.reshape(())
    key_a, key_b = seed & _WORD, (seed >> 32) & _WORD
    a, b, c, d = counter & _WORD, (counter >> 32) & _WORD, torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(10):
        high_a, low_a = _multiply_32(a, PHILOX_ROUND_A)
        high_b, low_b = _multiply_32(c, PHILOX_ROUND_B)
        a, b, c, d = high_b ^ b ^ key_a, low_b, high_a ^ d ^ key_b, low_a
        key_a, key_b = (key_a + PHILOX_KEY_A) & _WORD, (key_b + PHILOX_KEY_B) & _WORD
    return torch.stack((a, b, c, d), dim=-1)


def dropout_threshold(dropout_p: float) -> int:
    """An element is kept where its 32-bit word is at least this: round(p * 2**32), below 2**32 for every p < 1."""
    return min(round(dropout_p * 2**32), _WORD)


def dropout_keep(shape: torch.Size | tuple[int, ...], seed: Tensor, dropout_p: float) -> Tensor:
    """The keep mask of the dropout contract: bool [N, C, H, W], a pure function of (shape, seed, p).

    Element i in N, H, W, C order, whatever the memory layout, takes word i % 4 of counter i // 4.
    """
    n, c, h, w = shape
    total = n * c * h * w
    words = philox_4x32(seed, torch.arange((total + 3) // 4, device=seed.device)).reshape(-1)[:total]
    return (words >= dropout_threshold(dropout_p)).view(n, h, w, c).permute(0, 3, 1, 2)


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed from torch's own generator: int64, one element, on `device`."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


# ----------------------------------------------------------------------------------------------- memory and dtypes


def rows_are_channels(x: Tensor) -> bool:
    """Whether memory is walked as rows of C (channels_last) rather than rows of H * W (contiguous NCHW).

    A tensor can be both at once (C == 1 or H == W == 1); then the longer rows win, which is what keeps the bit mask
    small.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return not x.is_contiguous() or x.shape[2] * x.shape[3] == 1
    return False


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which x's memory is walked, and in which its results and gradients are made."""
    return torch.channels_last if rows_are_channels(x) else torch.contiguous_format


def bits_size(x: Tensor) -> int:
    """Bytes of the bit mask of x: every row of memory is padded to whole bytes, so that no two rows share one."""
    n, c, h, w = x.shape
    return n * h * w * ((c + 7) // 8) if rows_are_channels(x) else n * c * ((h * w + 7) // 8)


def pack_bits(mask: Tensor, like: Tensor) -> Tensor:
    """uint8 [bits_size(like)] from bool [N, C, H, W]: element k of a row is bit k % 8 of the row's byte k // 8."""
    rows = (
        mask.permute(0, 2, 3, 1).reshape(-1, mask.shape[1])
        if rows_are_channels(like)
        else mask.flatten(2).flatten(0, 1)
    )
    rows = F.pad(rows.to(torch.uint8), (0, -rows.shape[1] % 8)).view(rows.shape[0], -1, 8)
    bits: Tensor = (
        (rows << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8).reshape(-1)
    )
    return bits


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack_bits`: bool [N, C, H, W]."""
    n, c, h, w = like.shape
    inner = c if rows_are_channels(like) else h * w
    columns = (inner + 7) // 8
    rows = bits.view(-1, columns, 1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    rows = rows.reshape(-1, columns * 8)[:, :inner].bool()
    return rows.view(n, h, w, c).permute(0, 3, 1, 2) if rows_are_channels(like) else rows.view(n, c, h, w)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics, parameters and sums are float32 whatever the input's dtype; float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_size(size: int, stride: int) -> int:
    """Output positions along one axis of a convolution whose padding is half its kernel."""
    return (size - 1) // stride + 1
