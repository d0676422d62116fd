"""How two modules are compared, and how far apart they may be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import bound

FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32]


def close(actual: Tensor, expected: Tensor, length: int, what: str = "output", times: float = 1.0) -> None:
    """Assert that two results agree to rounding; `length` is the number of terms in the longest sum behind them.

    `times` stands for layers that pass errors on.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    error = (actual - expected).abs().double()
    allowed = times * bound(expected.double(), actual.dtype, length)
    worst = (error - allowed).argmax()
    assert bool((error <= allowed).all()), (
        f"{what}: differs by {error.flatten()[worst]:.2e}, allowed {allowed.flatten()[worst]:.2e}"
    )


def same_training(
    actual: nn.Module,
    expected: nn.Module,
    make_input: Callable[[], Tensor],
    *,
    steps: int = 3,
    times: float = 1.0,
    lr: float = 0.05,
) -> None:
    """Train both modules with SGD on the same inputs, then evaluate both.

    Compared: outputs, gradients of the input and of every parameter, and the buffers after every step; then the outputs
    and gradients in evaluation.
    """
    for step in range(steps):
        x = make_input()
        _same_pass(actual, expected, x, f"step {step}", times)
        with torch.no_grad():
            for module in (actual, expected):
                for p in module.parameters():
                    if p.grad is not None:
                        p -= lr * p.grad
                    p.grad = None
    modes = [(m, m.training) for n in (actual, expected) for m in n.modules()]
    actual.eval()
    expected.eval()
    _same_pass(actual, expected, make_input(), "evaluation", times)
    for module, mode in modes:
        module.training = mode


def _same_pass(actual: nn.Module, expected: nn.Module, x: Tensor, when: str, times: float) -> None:
    length = x.numel()
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    outputs = [module(v) for module, v in zip((actual, expected), inputs, strict=True)]
    close(outputs[0], outputs[1], length, f"output, {when}", times)
    gradient = torch.randn_like(outputs[1])
    for y in outputs:
        y.backward(gradient)
    close(inputs[0].grad, inputs[1].grad, length, f"input gradient, {when}", times)
    theirs = dict(expected.named_parameters())
    assert dict(actual.named_parameters()).keys() == theirs.keys()
    for name, p in actual.named_parameters():
        assert (p.grad is None) == (theirs[name].grad is None), name
        if p.grad is not None:
            close(p.grad, theirs[name].grad, length, f"gradient of {name}, {when}", times)
    buffers = dict(expected.named_buffers())
    for name, b in actual.named_buffers():
        if b.is_floating_point():
            close(b, buffers[name], length, f"{name}, {when}", times)
        else:
            assert torch.equal(b, buffers[name]), f"{name}, {when}: {b}, expected {buffers[name]}"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: a second thread costs more than it brings, far more where cores are busy.

    What a thread count changes is tested in tests/ops.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def learns_by_heart(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> bool:
    """Whether `steps` steps on the same images, in four classes, halve the loss at least, and reach every parameter."""
    target = torch.arange(len(x)) % 4
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] < losses[0] / 2 and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give parameters and statistics values that no initialisation has, so that swapping two of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for value, low in ((m.weight, 0.5), (m.running_var, 0.5), (m.bias, -0.5), (m.running_mean, -0.5)):
                    if value is not None:
                        value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + low)
    return module


def twin(module: nn.Module) -> nn.Module:
    """A copy with parameters and buffers of its own."""
    return copy.deepcopy(module)
