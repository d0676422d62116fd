"""Random networks: chains of the calls that the backend knows, and of writes, views and readers that stand in its way.

A seed gives the text of a forward method, line by line, and the network that runs it. Every named value is a feature
map [2, 4, 6, 6], so that any line may follow any other.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests.compiled.traps import Constant

CHANNELS, NORMS = 4, 3
SHAPE = (2, CHANNELS, 6, 6)
_LINES = (6, 16)
_BRANCHES = 0.35

_ACTIVATIONS = (
    "F.relu({a})", "torch.relu({a})", "{a}.relu()", "self.relu({a})", "F.leaky_relu({a}, 0.1)", "F.silu({a})",
    "F.gelu({a})", "F.hardswish({a})", "F.relu6({a})", "F.elu({a})", "{a}.clamp(min=0)", "torch.clamp_min({a}, 0)",
    "F.hardtanh({a}, 0.0, 6.0)", "torch.sigmoid({a})", "F.relu(input={a})",
)  # fmt: skip
_ACTIVATIONS_IN_PLACE = (
    "F.relu({a}, inplace=True)", "torch.relu_({a})", "{a}.relu_()", "self.relu_({a})", "F.leaky_relu_({a}, 0.1)",
    "F.silu({a}, True)", "F.elu_({a})", "F.hardswish({a}, inplace=True)", "{a}.clamp_(min=0)",
)  # fmt: skip
_NORMS = (
    *("self.bn{i}({a})",) * 4,
    "F.batch_norm({a}, self.bn{i}.running_mean, self.bn{i}.running_var, self.bn{i}.weight, None, self.training, 0.2)",
    "F.batch_norm({a}, None, None, self.bn{i}.weight, self.bn{i}.bias, training=True)",
    # Not a norm that training moves: backward in PyTorch would read its statistics as they are by then.
    "F.batch_norm({a}, self.frozen.running_mean, self.frozen.running_var)",
    "self.bn{i}({a}.contiguous(memory_format=torch.channels_last))",
    *("self.constant{i}({a})",) * 2,
)
_CONVOLUTIONS = ("self.conv0({a})", "self.conv1({a})", "self.pointwise0({a})", "self.pointwise1({a})")
_ADDITIONS = ("{a} + {b}", "torch.add({a}, {b})", "{a}.add({b})", "{b} + {a}")
_ADDITIONS_IN_PLACE = ("{a}.add_({b})", "operator.iadd({a}, {b})", "{a}.__iadd__({b})")
_BLOCKS = (
    "F.relu(self.bn{i}(self.conv0({a})) + {b})", "self.bn{i}(self.conv1({a})).add_({b}).relu_()",
    "F.silu(self.bn{i}({a}) + {b})", "F.relu(self.bn{i}({a})) + self.bn{j}(self.pointwise0({b}))",
    "self.relu(self.bn{i}(self.conv1({a})) + self.bn{j}(self.pointwise0({b})))",
    "self.conv0(F.relu(self.bn{i}({a})))", "self.conv1(self.relu_(self.bn{i}(self.conv1({a})))) + {b}",
    "F.gelu(self.bn{i}({a})) + self.bn{j}({b})", "self.conv0(F.silu(self.bn{i}({a}) + {b}))",
)  # fmt: skip
_OTHERS = (
    "torch.add({a}, {b}, alpha=0.5)", "{a} * 0.5", "{a} * {b}", "{a}.transpose(2, 3)", "{a}.flip(3)", "{a}.detach()",
    "F.avg_pool2d({a}, 3, 1, 1)", "{a}[:, 1:2].expand_as({a})", "{a} + {b}.mean((2, 3), keepdim=True)",
    "torch.cat([{a}[:, 2:], {b}[:, :2]], 1)", "torch.cat({a}.chunk(2, 1)[::-1], 1)",
    "torch.cat([F.relu(t) for t in {a}.split(2, 1)], 1)", "{a}.view_as({b})", "{a}.contiguous()", "{a}.clone()",
    "F.dropout({a}, 0.0, self.training)", "F.dropout(input={a}, p=0.3, training=False)",
    "F.dropout({a}, 1.0, self.training)", "self.dropout({a})", "{a} * self.bn{i}.running_mean.view(1, -1, 1, 1)",
    "{a} + self.bn{i}.running_var.clone().view(1, -1, 1, 1)", "{a} + self.bn{i}.weight.view(1, -1, 1, 1)",
)  # fmt: skip
_WRITES = (
    "{a}[:, :2].mul_(0.5)", "{a}[:, 1:3] = 0.25", "{a}.flatten(1).add_(0.5)", "{a}.detach().mul_(0.5)",
    "{a}.data.add_(0.5)", "{a}.copy_({b})", "{a}.mul_({b})", "torch._foreach_mul_([{a}, {b}], 0.5)",
    "torch.mul({b}.detach(), 0.5, out={a}.detach())", "{a}.narrow(1, 2, 2).zero_()", "{a}[0].relu_()",
    "self.bn{i}.running_mean.mul_(0.5)", "self.constant{i}.running_mean.mul_(0.5)",
    "self.bn{i}.running_var.add_(self.bn{i}.running_mean.square())",
    "F.dropout({a}, 0.0, True, True)",
)  # fmt: skip
_IN_PLACE = (_ACTIVATIONS_IN_PLACE, _ADDITIONS_IN_PLACE, _WRITES)
_WEIGHTS: dict[tuple[str, ...], float] = {
    _NORMS: 4, _ACTIVATIONS: 3, _ACTIVATIONS_IN_PLACE: 2, _CONVOLUTIONS: 2, _ADDITIONS: 2, _ADDITIONS_IN_PLACE: 1.5,
    _BLOCKS: 3, _OTHERS: 1.5, _WRITES: 0.8,
}  # fmt: skip


def lines_of(seed: int) -> list[str]:
    """The forward method of a seed."""
    rng = random.Random(seed)
    values, made, lines = ["x", "z", "v0"], 1, ["v0 = x + z"]

    def some() -> str:
        """Often the newest value, otherwise any that has a name."""
        return rng.choice(values) if rng.random() < _BRANCHES else values[-1]

    for _ in range(rng.randint(*_LINES)):
        kind = rng.choices(tuple(_WEIGHTS), tuple(_WEIGHTS.values()))[0]
        a, b = some(), rng.choice(values)
        if a == "x" and kind in _IN_PLACE:
            continue  # a leaf that wants a gradient
        line = rng.choice(kind).format(a=a, b=b, i=rng.randrange(NORMS), j=rng.randrange(NORMS))
        if kind is not _WRITES:
            name = f"v{made}"
            if rng.random() < 0.3 and values[-1] not in ("x", "z"):
                name = values.pop()  # the old value has no name any more
            else:
                made += 1
            values.append(name)
            line = f"{name} = {line}"
        lines += ["with torch.no_grad():", f"    {line}"] if rng.random() < 0.06 else [line]
    returned = [values[-1], *rng.sample(values, min(2, len(values)))]
    return [*lines, f"return {', '.join(returned)}"]


def text_of(seed: int) -> str:
    return "\n".join(["def forward(self, x, z):", *[f"    {line}" for line in lines_of(seed)]])


class Program(nn.Module):
    """The network of a seed: x and z, [2, 4, 6, 6] each, to three values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.conv0, self.conv1 = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=bias) for bias in (False, True))
        self.pointwise0, self.pointwise1 = (nn.Conv2d(CHANNELS, CHANNELS, 1, bias=bias) for bias in (False, True))
        self.bn0, self.bn1, self.bn2 = (nn.BatchNorm2d(CHANNELS) for _ in range(NORMS))
        self.frozen = nn.BatchNorm2d(CHANNELS)
        self.constant0, self.constant1, self.constant2 = (Constant(CHANNELS) for _ in range(NORMS))
        self.relu, self.relu_, self.dropout = nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.0)
        self.run = _compiled(text_of(seed))

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return self.run(self, x, z)


def _compiled(text: str) -> Callable[..., tuple[Tensor, ...]]:
    space = {"torch": torch, "F": F, "operator": operator}
    exec(text, space)
    found: Callable[..., tuple[Tensor, ...]] = space["forward"]  # type: ignore[assignment]
    return found
