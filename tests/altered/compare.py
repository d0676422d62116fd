"""What counts as the same: outputs, gradients, running statistics, counters and state_dict after the same steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils import _pytree as pytree

from tests import oracle
from tests.altered.subjects import Subject
from tests.oracle import bound, generator, near_zero, weight_length

Results = dict[str, Any]

# Plain float32's own error may be small by luck in one tensor, and each layer passes errors on to the next.
OWN_ERROR = 4.0
LAYERS = 8.0


class Draw:
    """The same random inputs for every module that is compared, in the dtype that it computes in; and what was seen."""

    def __init__(self, subject: Subject, key: tuple[object, ...], dtype: torch.dtype = torch.float32) -> None:
        self.subject, self.key, self.dtype = subject, key, dtype
        self.stored = torch.float32
        self.seen: Results = {}

    def tensor(self, name: object, shape: tuple[int, ...]) -> Tensor:
        value = torch.randn(shape, generator=generator(*self.key, name), dtype=torch.float64)
        return value.to(self.stored).to(self.dtype)

    def x(self, index: int = 0, *, layout: str = "channels_last", shape: tuple[int, ...] | None = None) -> Tensor:
        """An input, a leaf that asks for its gradient."""
        x = self.tensor(f"x{index}", shape or self.subject.shape())
        return x.contiguous(memory_format=oracle.LAYOUTS[layout]).requires_grad_()

    def dy(self, y: Tensor, index: object = 0) -> Tensor:
        return self.tensor(f"dy{index}", tuple(y.shape)).to(y.dtype)

    def lower(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Turn the model, and inputs from here on, to `dtype`; in the float64 run to the same values in float64."""
        self.stored = dtype
        model.to(dtype)
        if self.dtype is torch.float64:
            return model.double()
        self.dtype = dtype
        return model

    def autocast(self, dtype: torch.dtype, **options: Any) -> torch.autocast:
        """Autocast on the CPU, off in the float64 run."""
        return torch.autocast("cpu", dtype, enabled=self.dtype is not torch.float64, **options)

    def see(self, what: str, value: Any) -> None:
        """Note what a hook saw, in the order of the calls."""
        if isinstance(value, Tensor):
            value = value.detach().clone()
        self.seen[f"{len(self.seen)} {what}"] = value


def backward(y: Any, draw: Draw, index: object = 0) -> None:
    """Backward from every output with random gradients."""
    outputs = [t for t in pytree.tree_leaves(y) if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.backward(outputs, [draw.dy(t, f"{index}.{i}") for i, t in enumerate(outputs)])


def record(results: Results, when: str, **values: Any) -> None:
    for name, value in values.items():
        for i, leaf in enumerate(pytree.tree_leaves(value, is_leaf=lambda v: v is None)):
            kept = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
            results[f"{when}: {name}" + (f"[{i}]" if i else "")] = kept


def state(results: Results, when: str, model: nn.Module, *, gradients: bool = True) -> None:
    """Note the gradients of all parameters, and parameters and buffers."""
    # In order: an optimizer's state is saved by number.
    results[f"{when}: parameters"] = [common(name) for name, _ in model.named_parameters()]
    if gradients:
        for name, p in model.named_parameters():
            record(results, when, **{f"gradient of {name}": p.grad})
    for name, value in model.state_dict().items():
        record(results, when, **{name: value})


def step(
    model: Callable[..., Any], draw: Draw, results: Results, when: str, index: int = 0, x: Tensor | None = None
) -> None:
    """Forward and backward in the mode that the module is in."""
    x = draw.x(index) if x is None else x
    y = model(x)
    record(results, when, output=y)
    backward(y, draw, index)
    if x.is_leaf:
        record(results, when, **{"gradient of x": x.grad})
    if isinstance(model, nn.Module):
        state(results, when, model)


def descend(model: nn.Module, rate: float = 0.05) -> None:
    """A step of gradient descent."""
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= rate * p.grad
                p.grad = None


def infer(model: nn.Module, draw: Draw, results: Results, when: str, index: int = 5) -> None:
    model.eval()
    with torch.no_grad():
        record(results, when, output=model(draw.x(index).detach()))


def observe(model: nn.Module, draw: Draw) -> Results:
    """What every altered module is put through: a step in the mode that it is in, descent, evaluation."""
    results: Results = {}
    step(model, draw, results, "step")
    descend(model)
    model.eval()
    step(model, draw, results, "evaluation", 1)
    infer(model, draw, results, "inference", 1)
    return results


# ----------------------------------------------------------------------------------------------------------- comparison


def common(name: str) -> str:
    """FusedBatchNormAct2d's state_dict is that of its child."""
    return name.replace("norm.", "")


def problems(
    subject: Subject, ours: Results, theirs: Results, exact: Results | None, *, low_precision: bool = False
) -> list[str]:
    """Every difference, a line each."""
    ours, theirs = ({common(k): v for k, v in r.items()} for r in (ours, theirs))
    exact = None if exact is None else {common(k): v for k, v in exact.items()}
    found = []
    if ours.keys() != theirs.keys():
        mine, plain = (sorted(set(a) - set(b)) for a, b in ((ours, theirs), (theirs, ours)))
        found.append(f"names: only ours {mine}, only plain {plain}")
    for name in (name for name in theirs if name in ours):
        true = None if exact is None else exact[name]
        problem = differs(ours[name], theirs[name], true, subject, low_precision)
        if problem:
            found.append(f"{name}: {problem}")
    if low_precision and not found and exact is not None:
        found += further_than_plain(ours, theirs, exact)
    return found


def further_than_plain(ours: Results, theirs: Results, exact: Results) -> list[str]:
    """Where all tensors together are further from float64 than plain PyTorch's, each relative to its size.

    ReLUs flip where 8 bits cannot tell the sign, in plain PyTorch as well, and a channel's gradient is then off by a
    share that chance decides: a single tensor says little.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    for name, true in exact.items():
        if not isinstance(true, Tensor) or not true.is_floating_point() or not ours[name].isfinite().all():
            continue
        rms = true.double().square().mean().sqrt()
        if rms > 1e-9:  # a gradient that is zero but for rounding has no size
            errors = ((t[name].double() - true.double()) / rms for t in (ours, theirs))
            squares += torch.stack([e.square().mean() for e in errors])
    ratio = float((squares[0] / squares[1].clamp(min=1e-30)).sqrt())
    return [f"all together: {ratio:.1f} times as far from float64 as plain"] if ratio > OWN_ERROR else []


def differs(ours: Any, theirs: Any, exact: Any, subject: Subject, low_precision: bool) -> str | None:
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
        return None if type(ours) is type(theirs) and ours == theirs else f"{ours!r}, expected {theirs!r}"
    for what in ("shape", "dtype", "device"):
        if getattr(ours, what) != getattr(theirs, what):
            return f"{what} {getattr(ours, what)}, expected {getattr(theirs, what)}"
    if not theirs.is_floating_point():
        return None if torch.equal(ours, theirs) else f"{ours.tolist()}, expected {theirs.tolist()}"
    if torch.equal(ours, theirs):
        return None
    true = (theirs if exact is None else exact).double()
    finite = theirs.isfinite()
    if not torch.equal(ours.isfinite(), finite):
        return f"{int((~ours.isfinite()).sum())} values that are not finite, expected {int((~finite).sum())}"
    ours, theirs, true = (t.double()[finite] for t in (ours, theirs, true))
    if true.numel() == 0:
        return None
    if low_precision:
        return None  # see further_than_plain
    error, own = (ours - true).abs(), (theirs - true).abs()
    length = weight_length(torch.empty(subject.shape(), device="meta"))
    allowed = LAYERS * bound(true, torch.float32, length)
    excess = (error - allowed).max() - OWN_ERROR * own.max()
    rms = true.square().mean().sqrt().clamp(min=1e-30)
    if excess > 0:
        return f"off by {error.max() / rms:.2e} of its rms, plain by {own.max() / rms:.2e}"
    return None


def in_doubt(relu_inputs: list[Tensor]) -> bool:
    """Whether rounding may decide about a ReLU: its gradient then says nothing."""
    return any(bool(near_zero(z.double(), torch.float32, 1e-6).any()) for z in relu_inputs if z.numel() > 0)
