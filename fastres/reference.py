"""The operators in plain PyTorch.

Two halves. The differentiable functions, from `batch_norm_act` to `conv3x3_norm_act`, say what the operators mean in as
few lines as that takes; the tests hold every backend against them in float64. Below them the same mathematics stage by
stage (statistics, apply, backward sums, backward apply), in the form in which the operators call it: that half is the
fallback where nothing is compiled.

Notation: x is [N, C, H, W], M = N * H * W elements a channel, xhat = (x - mean) * rstd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PHILOX_ROUND_A, PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_A, PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


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


# ---------------------------------------------------------------------------------------------------------------------
# Dropout: Philox, and the bit mask
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# What the operators mean
# ---------------------------------------------------------------------------------------------------------------------


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics, parameters and sums are float32 whatever the input's dtype; float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, m2: Tensor, count: int, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place, with the unbiased variance."""
    if running_mean is None or running_var is None:
        return
    with torch.no_grad():
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
        running_var.copy_((1 - momentum) * running_var + momentum * (m2 / (count - 1)))


def _channels(v: Tensor) -> Tensor:
    return v[:, None, None]


def _normalise(x: Tensor, norm: NormParams, training: bool) -> Tensor:
    dtype = statistics_dtype(x.dtype)
    x = x.to(dtype)
    mean, var, weight, bias = (None if t is None else t.to(dtype) for t in norm[:4])
    if x.numel() == 0:
        # F.batch_norm asks for values in training; no element is there that a statistic would touch.
        mean, var, training = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), False
    # F.batch_norm takes no eps of 0 in training; the smallest number in its place is felt in a constant channel alone.
    eps = norm.eps or (torch.finfo(dtype).tiny if training else 0.0)
    z = F.batch_norm(x, mean, var, weight, bias, training, norm.momentum, eps)
    for kept, new in ((norm.running_mean, mean), (norm.running_var, var)):
        if training and kept is not None and new is not None and kept.dtype != dtype:
            with torch.no_grad():
                kept.copy_(new)
    return z


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_norm: NormParams | None = None,
    relu: bool = True,
    dropout_p: float = 0.0,
    order: str = "add_act",
    seed: Tensor | None = None,
) -> Tensor:
    """`fastres.functional.batch_norm_act` in plain PyTorch, differentiable by autograd. It trusts its arguments.

    Source: Ioffe and Szegedy 2015, algorithm 1; He et al. 2015, figure 2; Srivastava et al. 2014, section 4.
    """
    z = _normalise(x, NormParams(running_mean, running_var, weight, bias, momentum, eps), training)
    r = residual.to(z.dtype) if residual is not None else None
    if residual is not None and residual_norm is not None:
        r = _normalise(residual, residual_norm, training)
    if order == "add_act" and r is not None:
        z = z + r
    if relu:
        z = F.relu(z)
    if training and dropout_p > 0:
        if seed is None:
            seed = draw_seed(x.device)
        z = torch.where(dropout_keep(x.shape, seed, dropout_p), z / (1 - dropout_p), 0)
    if order == "act_add" and r is not None:
        z = z + r
    y = z.to(x.dtype)
    # A batched tensor knows of no memory format but the default one.
    return (
        y if torch._C._functorch.get_dynamic_layer_stack_depth() > 0 else y.contiguous(memory_format=memory_format(x))
    )


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed from torch's own generator: int64, one element, on `device`."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def projection_shortcut(
    s: Tensor,
    conv_weight: Tensor,
    norm: NormParams,
    x: Tensor | None = None,
    x_norm: NormParams | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    training: bool = False,
    relu: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`fastres.functional.projection_shortcut` in plain PyTorch, differentiable; it trusts its arguments."""
    product = F.conv2d(s, conv_weight, stride=stride)
    common: dict[str, Any] = {"training": training, "relu": relu, "dropout_p": dropout_p, "seed": seed}
    if x is None or x_norm is None:
        return batch_norm_act(
            product,
            *norm[:4],
            momentum=norm.momentum,
            eps=norm.eps,
            residual=x,
            **common,
        )
    return batch_norm_act(
        x,
        *x_norm[:4],
        momentum=x_norm.momentum,
        eps=x_norm.eps,
        residual=product,
        residual_norm=norm,
        **common,
    )


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """`fastres.functional.conv3x3` in plain PyTorch: the direct convolution, differentiable any number of times."""
    return F.conv2d(x, weight, padding=1)


def norm_act_conv3x3(
    x: Tensor,
    norm: NormParams,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    dropout_p: float = 0.0,
    order: str = "add_act",
    seed: Tensor | None = None,
) -> Tensor:
    """y of `fastres.functional.norm_act_conv3x3` in plain PyTorch, differentiable; it trusts its arguments."""
    a = batch_norm_act(
        x, *norm[:4], training=True, momentum=norm.momentum, eps=norm.eps, residual=residual, relu=relu,
        dropout_p=dropout_p, order=order, seed=seed,
    )  # fmt: skip
    return conv3x3(a, weight)


def conv3x3_norm_act(
    x: Tensor,
    weight: Tensor,
    norm: NormParams,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    stride: int = 1,
) -> Tensor:
    """`fastres.functional.conv3x3_norm_act` in plain PyTorch, differentiable; it trusts its arguments."""
    product = F.conv2d(x, weight, stride=stride, padding=1)
    return batch_norm_act(product, *norm[:4], eps=norm.eps, residual=residual, relu=relu)


# ---------------------------------------------------------------------------------------------------------------------
# The operators, stage by stage
# ---------------------------------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """What happens to z: relu, dropout with rate `dropout_p`, and on which side of them the residual is added."""

    relu: bool
    dropout_p: float
    order: str


class Affine(NamedTuple):
    """One normalised input with its statistics: z = weight * (value - mean) * rstd + bias."""

    value: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def xhat(self) -> Tensor:
        return (self.value.to(self.mean.dtype) - _channels(self.mean)) * _channels(self.rstd)

    def scale(self) -> Tensor:
        return self.rstd if self.weight is None else self.rstd * self.weight

    def z(self) -> Tensor:
        z = (self.value.to(self.mean.dtype) - _channels(self.mean)) * _channels(self.scale())
        return z if self.bias is None else z + _channels(self.bias)


def needs_bits(act: Activation, has_residual: bool) -> bool:
    """Whether backward cannot tell from x alone which elements were passed on."""
    return act.dropout_p > 0 or (act.relu and has_residual and act.order == "add_act")


def stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count int64 [1], mean [C], M2 [C]): M2 is the sum of squared deviations from the mean."""
    count = x.numel() // x.shape[1]
    var, mean = torch.var_mean(x.to(statistics_dtype(x.dtype)), (0, 2, 3), correction=0)
    return torch.full((1,), count, dtype=torch.int64, device=x.device), mean, var * count


def finalise(
    x: Tensor,
    mean: Tensor | None,
    m2: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of the batch, both new, out of its statistics or, where they are not known, of x itself.

    The running statistics are updated in place.
    """
    count = x.numel() // x.shape[1]
    if mean is None or m2 is None:
        _, mean, m2 = stats(x)
    else:
        mean = mean.clone()
    update_running(running_mean, running_var, mean, m2, count, momentum)
    return mean, torch.rsqrt(m2 / count + eps)


def apply(
    x: Affine, residual: Tensor | Affine | None, seed: Tensor | None, act: Activation, save_bits: bool
) -> tuple[Tensor, Tensor]:
    """(y, bits): bits is empty where `save_bits` is off or backward can do without."""
    z = x.z()
    r = residual.z() if isinstance(residual, Affine) else residual
    if act.order == "add_act" and r is not None:
        z = z + r
    passed = ~(z <= 0) if act.relu else torch.ones_like(z, dtype=torch.bool)  # as relu does, NaN passes
    if act.dropout_p > 0:
        assert seed is not None
        passed = passed & dropout_keep(z.shape, seed, act.dropout_p)
        z = z / (1 - act.dropout_p)
    z = torch.where(passed, z, 0)
    if act.order == "act_add" and r is not None:
        z = z + r
    y = torch.empty_like(x.value).copy_(z)
    if save_bits and needs_bits(act, residual is not None):
        return y, pack_bits(passed, x.value)
    return y, torch.empty(0, dtype=torch.uint8, device=y.device)


def masked_gradient(dy: Tensor, x: Affine, bits: Tensor | None, act: Activation) -> Tensor:
    """g = dy * bit / (1 - p): the gradient that reaches z, in the statistics' dtype."""
    g = dy.to(x.mean.dtype)
    if bits is not None and bits.numel() > 0:
        passed = unpack_bits(bits, x.value)
    elif act.relu:
        passed = ~(x.z() <= 0)
    else:
        return g
    return torch.where(passed, g / (1 - act.dropout_p), 0)


def backward_reduce(
    dy: Tensor, x: Affine, residual: Affine | None, bits: Tensor | None, act: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dweight, dbias, residual dweight, residual dbias), each [C]: sums of g * xhat and of g.

    The last two are empty unless the residual has a normalisation of its own.
    """
    g = masked_gradient(dy, x, bits, act)
    dweight, dbias = (g * x.xhat()).sum((0, 2, 3)), g.sum((0, 2, 3))
    if residual is None:
        return dweight, dbias, g.new_empty(0), g.new_empty(0)
    dr = g if act.order == "add_act" else dy.to(g.dtype)
    return dweight, dbias, (dr * residual.xhat()).sum((0, 2, 3)), dr.sum((0, 2, 3))


def _input_gradient(g: Tensor, x: Affine, sums: tuple[Tensor, Tensor] | None, count: Tensor | int) -> Tensor:
    if sums is not None:
        dweight, dbias = sums
        g = g - _channels(dbias / count) - x.xhat() * _channels(dweight / count)
    return g * _channels(x.scale())


def gradients(
    dy: Tensor, x: Affine, residual: Affine | None, bits: Tensor | None, act: Activation, training: bool
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(g, dx, dresidual, sums) as expressions of their inputs, which can be differentiated again and batched.

    Args:
        x, residual: in training with statistics that are expressions of their values, see `batch_statistics`.
    Returns:
        g as `masked_gradient`; dresidual None without a normalised residual; sums as `backward_reduce`.
    """
    g = masked_gradient(dy, x, bits, act)
    sums = backward_reduce(dy, x, residual, bits, act)
    count = x.value.numel() // x.value.shape[1]
    dx = _input_gradient(g, x, sums[:2] if training else None, count).to(x.value.dtype)
    if residual is None:
        return g, dx, None, sums
    dz = g if act.order == "add_act" else dy.to(g.dtype)
    dr = _input_gradient(dz, residual, sums[2:] if training else None, count).to(x.value.dtype)
    return g, dx, dr, sums


def batch_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of the batch as expressions of x."""
    var, mean = torch.var_mean(x.to(statistics_dtype(x.dtype)), (0, 2, 3), correction=0)
    return mean, torch.rsqrt(var + eps)


def backward_apply(
    dy: Tensor,
    x: Affine,
    residual: Tensor | Affine | None,
    bits: Tensor | None,
    act: Activation,
    sums: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    count: Tensor | int,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """(dx, dresidual); what is not needed is empty. `sums` None means evaluation: statistics are constants.

    dx = weight * rstd * (g - dbias / M - xhat * dweight / M). A residual without a normalisation of its own gets g
    ("add_act") or dy itself ("act_add").
    Source: Ioffe and Szegedy 2015, section 3.
    """
    g = masked_gradient(dy, x, bits, act)
    dx, dr = dy.new_empty(0), dy.new_empty(0)  # an operator may not return one tensor twice
    if needs[0]:
        dx = torch.empty_like(x.value).copy_(_input_gradient(g, x, sums[:2] if sums else None, count))
    if needs[1]:
        dz = g if act.order == "add_act" else dy.to(g.dtype)
        if isinstance(residual, Affine):
            dz = _input_gradient(dz, residual, sums[2:] if sums else None, count)
        dr = torch.empty_like(x.value).copy_(dz)
    return dx, dr
