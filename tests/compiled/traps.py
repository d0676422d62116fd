"""Networks of ten lines, each with something in it that a careless rewriter gets wrong.

Values that are written, read under an old name, through a view or by the network itself. Each takes x [N, 3, H, W].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Trap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.Conv2d(3, 8, 1)
        self.bn, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)


class OldNameAfterInPlaceReLU(Trap):
    def forward(self, x: Tensor) -> Tensor:
        a = self.bn(self.conv(x))
        b = F.relu(a, inplace=True)
        return a * 2 + b


class ViewBeforeInPlaceReLU(Trap):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.bn(self.conv(x))
        view = a[:, :2]
        a.relu_()
        return view * 3, a + 1


class OldNameAfterInPlaceAddition(Trap):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.other(x)
        view = r.flatten(1)
        r += self.bn(self.conv(x))
        return view * 2, F.relu(r)


class AdditionIntoTheInput(Trap):
    def forward(self, x: Tensor) -> Tensor:
        r = x.repeat(1, 3, 1, 1)[:, 1:]
        r += self.bn(self.conv(x))
        return F.relu(r)


class ResidualOverwrittenAfter(Trap):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.other(x)
        z = self.bn(self.conv(x)) + r
        r.mul_(0.5)
        return F.relu(z), r * 1


class ResidualMadeInPlaceBetween(Trap):
    def forward(self, x: Tensor) -> Tensor:
        r = self.other(x)
        y = self.bn(self.conv(x))
        r.add_(1.0)
        return F.relu(y + r)


class InputOverwrittenBehind(Trap):
    """In evaluation: in training PyTorch refuses, since the normalisation saved its input."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            c = self.conv(x)
            y = self.bn(c)
            c.zero_()
            z = F.relu(y)
        return z + c + self.other(x)


class RunningMeanReadBetween(Trap):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(self.conv(x))
        mean = self.bn.running_mean.clone()
        return F.relu(y), mean


class RunningMeanWrittenBetween(Trap):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.bn(self.conv(x))
            self.bn.running_mean.zero_()
            self.bn.num_batches_tracked.add_(3)
            z = F.relu(y)
        return z + self.other(x)


class OneNormTwice(Trap):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.bn(self.other(x)))


class SharedRunningStatistics(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.second.running_mean = self.bn.running_mean

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> SharedRunningStatistics:
        super()._apply(fn, recurse)
        self.second.running_mean = self.bn.running_mean  # another dtype makes a tensor of each name
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.second(self.other(x)))


class WrittenBeforeReturned(Trap):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.silu(self.bn(self.conv(x)))
        z = y * 2
        y.add_(1.0)
        return y, z


class ConvolutionWrittenBeforeNorm(Trap):
    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        c.mul_(2.0)
        return F.relu(self.bn(c))


class ConvolutionBiasWritten(Trap):
    """The running mean has the bias as the convolution read it; autograd does not notice what is written to `.data`."""

    def forward(self, x: Tensor) -> Tensor:
        c = F.conv2d(x, self.conv.weight, self.other.bias, padding=1)
        self.other.bias.data.mul_(0.5)
        return F.relu(self.bn(c))


class RunningMeanAsBias(Trap):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(F.conv2d(x, self.conv.weight, self.bn.running_mean, padding=1)))


class RunningMeanAsFactor(Trap):
    """PyTorch's product saves the mean and finds it updated, which autograd does not know."""

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.other(x) * self.bn.running_mean.view(1, -1, 1, 1)
        return F.relu(self.bn(self.conv(x)) + scaled)


class RunningStatisticsMoved(Trap):
    """In evaluation backward reads them, where they could be moved once more."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.bn.running_mean.mul_(0.5)
        y = F.silu(self.bn(self.conv(x)))
        with torch.no_grad():
            self.second.running_var.add_(self.second.running_mean.square())
        return y + F.silu(self.second(self.other(x)))


class NormBiasWritten(Trap):
    """Backward would compute SiLU's input again."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn(self.conv(x))) + self.second(self.other(x))
        self.bn.bias.data.add_(1.0)
        with torch.no_grad():
            self.second.bias.mul_(0.5)
        return y


class PartsOfTensors(Trap):
    """Statistics and parameters of a normalisation that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("statistics", torch.rand(8, 2) + 0.5)
        self.scales, self.shift = nn.Parameter(torch.rand(8, 3)), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.statistics.unbind(1)
        weight, bias = self.scales[:, 1], self.shift.expand(8)
        y = F.batch_norm(self.conv(x), mean, var, weight, self.bn.bias, self.training)
        y = y + F.batch_norm(self.other(x), self.bn.running_mean, self.bn.running_var, None, bias, self.training)
        return F.relu(self.second(y))


class OutIsAnAlias(Trap):
    """What is written is another tensor for autograd than what is read, though it is the same memory."""

    def forward(self, x: Tensor) -> Tensor:
        c, o = self.conv(x), self.other(x)
        alias = o.detach()
        with torch.no_grad():
            torch.mul(c, 0.5, out=c.detach())
            torch.mul(alias, 0.5, out=o)
        return F.relu(self.bn(c)) + o + alias


class ScaledELU(Trap):
    def forward(self, x: Tensor) -> Tensor:
        return F.elu_(self.bn(self.conv(x)), 1.0, 2.0) + F.elu_(self.second(self.other(x)), 0.5, 1, input_scale=3.0)


class OutArgument(Trap):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(self.conv(x))
        buffer = torch.zeros_like(y)
        torch.mul(y.detach(), 2.0, out=buffer)
        return F.relu(y + buffer), buffer


class ListOfTensors(Trap):
    def forward(self, x: Tensor) -> Tensor:
        r = self.other(x)
        y = self.bn(self.conv(x)) + r
        torch._foreach_mul_([r], 0.5)
        return F.relu(y) + r


class Clamp(Trap):
    """A weight of 0, as zero initialisation makes it: clamp passes the gradient at 0, where ReLU does not."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), None, None, 0 * self.bn.weight, 0 * self.bn.bias, True)
        return y.clamp(min=0) + self.second(self.conv(x)).clamp(min=0)


class WithoutGradients(Trap):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = F.relu(self.bn(self.conv(x)))
        y = self.bn(self.conv(x))
        with torch.no_grad():
            b = F.relu(y)
        return a + b + y


class GradientsSwitchedBetween(Trap):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        with torch.no_grad():
            z = y * 2
        return F.relu(y) + z


class Broadcast(Trap):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y + self.other(x).mean((2, 3), keepdim=True)) + torch.add(self.second(y), y, alpha=0.5)


class AddedToItself(Trap):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y + y)


class ReadInBetween(Trap):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(self.conv(x))
        z = y + self.other(x)
        return F.relu(z), torch.sigmoid(y)


class ActivationBeforeResidual(Trap):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.conv(x)), 0.2) + self.second(self.other(x))


class TwoActivations(Trap):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.hardswish(F.relu6(self.bn(self.conv(x)))))


class InPlaceOnInput(Trap):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        c = self.conv(x)
        y = self.bn(c)
        r = self.other(x)
        r = r.mul_(2.0)
        r = r.add_(y)
        return F.elu(r, inplace=True)


class Hooked(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.bn.register_forward_hook(lambda module, args, out: out * 2 + args[0])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Uncounted(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
        self.second = nn.BatchNorm2d(8, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.second(self.other(x)))


class Frozen(Trap):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.eval()
        return F.relu(self.bn(self.conv(x)) + self.second(self.other(x)))


class DetachedAlias(Trap):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(self.conv(x))
        alias = y.detach()
        z = F.relu(y)
        alias.zero_()
        return z, alias + 1


class SplitViews(Trap):
    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        a, b = torch.split(c, 4, 1)
        y = F.relu(self.bn(c))
        return y * torch.cat([b, a], 1)


class Constant(nn.Module):
    """FrozenBatchNorm2d, as detectors have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def factors(self) -> tuple[Tensor, Tensor]:
        w, b, v, m = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (v + 1e-5).rsqrt()
        return scale, b - m * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.factors()
        return x * scale + shift


class ConstantNorm(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.second, self.third = Constant(8), Constant(8), Constant(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.third(self.bn(self.conv(x))) + self.second(self.other(x)))


class ConstantNormOfWhatIsOverwritten(ConstantNorm):
    """PyTorch refuses this of a normalisation, which saves its input; of the arithmetic it does not."""

    def forward(self, x: Tensor) -> Tensor:
        c, o = self.conv(x), self.other(x)
        y = torch.sigmoid(self.bn(c)) + F.relu(c, inplace=True)
        scale, shift = self.second.factors()
        product = o * scale
        o.mul_(0.5)
        return y + F.relu(product + shift) + o


class SmoothAfterConstantNormOfWhatIsOverwritten(ConstantNorm):
    """A smooth activation's gradient is that of its input, out of which it could be computed again."""

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        y = F.silu(self.bn(c))
        return y + c.mul_(0.5)


class ConstantsWrittenBetween(ConstantNorm):
    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        scale, shift = self.bn.factors()
        self.bn.running_var.mul_(2.0)
        self.bn.weight.add_(1.0)
        y = F.relu(c * scale + shift)
        scale, shift = self.second.factors()
        scale[:, :2].mul_(0.5)
        return y + F.relu(self.other(x) * scale + shift)


class ConstantsReadElsewhere(ConstantNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.bn.factors()
        y = F.relu(self.conv(x) * scale + shift)
        return y * shift, scale


class ShapedByName(ConstantNorm):
    def forward(self, x: Tensor) -> Tensor:
        scale, _ = self.bn.factors()
        return F.relu(self.conv(x) * scale + torch.reshape(input=self.bn.bias, shape=(1, -1, 1, 1)))


class ConstantsWrittenBehind(ConstantNorm):
    """Of the constants the product has saved the scale alone."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        self.bn.weight.mul_(0.5)
        return y


class AlmostConstantNorm(ConstantNorm):
    """The scale of one and the shift of another; the shift without its mean; a variance that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        c, o = self.conv(x), self.other(x)
        y = F.relu(c * self.bn.factors()[0] + self.second.factors()[1])
        y = y + F.relu(o * self.bn.factors()[0] + self.bn.bias[0])
        scale = (self.third.weight * (self.variance + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return y + F.relu(o * scale + (self.third.bias.reshape(1, -1, 1, 1) - scale * 2))


TRAPS = [t for t in globals().values() if isinstance(t, type) and issubclass(t, Trap) and t is not Trap]
