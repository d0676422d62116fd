"""A compiled network against the same network in plain PyTorch, float64: two training steps, and evaluation.

In float64 both sides agree to 1e-9, whatever a ReLU does. In float32 an element whose ReLU input is 0 up to rounding
would pass a gradient on one side only, and so would one of two that are the largest of a pool's window; so inputs are
drawn until there is none. In bfloat16 and float16 there always are some, and how much they matter differs from draw to
draw, so the worst of several draws are compared.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastres
from fastres.backend import GraphReport
from fastres.backend import layout as layout_of_graphs
from tests import oracle

EXACT = 1e-9
_DRAWS = 60
_HALF_DRAWS = 3
Drawn = tuple[nn.Module, list[list[Tensor]]]
# How many times PyTorch's own error ours may be; and how many times its largest in a tensor that in one element is
# taken to be possible. Winograd's are about twice PyTorch's, whose largest of thousands is 4 standard deviations: so 3
# times that is 6 of ours.
_TIMES, _POSSIBLE = 8, 3
_KINKS = {
    "aten::relu": (0.0,), "aten::relu_": (0.0,), "aten::clamp": (0.0,), "aten::clamp_": (0.0,),
    "aten::threshold": (0.0,), "aten::leaky_relu": (0.0,), "aten::leaky_relu_": (0.0,), "aten::hardtanh": (0.0, 6.0),
    "aten::hardtanh_": (0.0, 6.0), "aten::hardswish": (-3.0, 3.0), "aten::hardswish_": (-3.0, 3.0),
    "aten::clamp_min": (0.0,), "aten::clamp_min_": (0.0,), "aten::relu6": (0.0, 6.0),
}  # fmt: skip
_POOL = "aten::max_pool2d_with_indices"


class _Decisions(TorchDispatchMode):
    """What decides where gradients go: the inputs of activations with kinks and of max pooling, in order.

    Without gradients nothing does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled() and ((name := func._schema.name) in _KINKS or name == _POOL):
            self.seen.append((name, args[0].double().clone(), args[1:]))
        return func(*args, **(kwargs or {}))


def _doubtful(exact: _Decisions, rounded: _Decisions) -> bool:
    """Whether errors as large as ours may be could change a decision."""
    for (name, z, args), (_, other, _) in zip(exact.seen, rounded.seen, strict=True):
        error = _POSSIBLE * (z - other).abs().max()
        if name == _POOL:
            if _closest_in_window(z, *args) <= 2 * error:
                return True
        elif any(((z - kink).abs() <= error).any() for kink in _KINKS[name]):
            return True
    return False


def _closest_in_window(z: Tensor, size: list[int], stride: Any = (), padding: Any = 0, *_: Any) -> Tensor:
    """How far apart the two largest of a pool's window are at least.

    Equal ones are zeros of a ReLU, which pass no gradient on, or computed of equal pixels, to which it goes either way.
    """
    stride, padding = stride or size, [padding] * 2 if isinstance(padding, int) else padding
    padded = F.pad(z, (padding[-1], padding[-1], padding[0], padding[0]), value=-torch.inf)
    windows = padded.unfold(2, size[0], stride[0]).unfold(3, size[-1], stride[-1]).flatten(-2)
    first, second = windows.topk(2).values.unbind(-1)
    return torch.where(first == second, torch.inf, first - second).min()


@dataclass
class Run:
    """What a network gave: name -> value."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def note(self, prefix: str, found: Any) -> None:
        for i, t in enumerate(t for t in tree_leaves(found) if isinstance(t, Tensor)):
            self.values[f"{prefix} {i}"] = t.detach().clone()


def train_and_evaluate(
    model: nn.Module,
    call: Callable[..., Any],
    inputs: list[list[Tensor]],
    *,
    autocast: torch.dtype | None = None,
    differentiable: bool = False,
) -> Run:
    """A step of SGD for each of the inputs but the last, and the evaluation of that one.

    Args:
        differentiable: evaluate with a graph of autograd as well.
    """
    run = Run()
    model.train()
    *steps, last = inputs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    context = contextlib.nullcontext if autocast is None else lambda: torch.autocast("cpu", autocast)
    for step, tensors in enumerate(steps):
        optimizer.zero_grad(set_to_none=True)
        with context():
            out = call(*tensors)
        run.note(f"step {step}: output", out)
        leaves = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        # Of y + 1, for the gradient of y * y is 0 where y is, whatever a ReLU at the end lets pass.
        sum((((t.double() + 1) ** 2).sum() / t.numel() for t in leaves), torch.zeros(())).backward()
        run.note(
            f"step {step}: gradient", [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        )
        optimizer.step()
        run.note(f"step {step}: parameter", list(model.parameters()))
        run.note(f"step {step}: buffer", list(model.buffers()))
    model.eval()
    for grads in (False, True)[: 1 + differentiable]:
        with torch.set_grad_enabled(grads), context():
            run.note(f"evaluation, gradients {grads}: output", call(*last))
    run.note("evaluation: buffer", list(model.buffers()))
    return run


def worst(run: Run, exact: Run) -> tuple[float, str]:
    """The largest relative error in root mean square, and where."""
    assert run.values.keys() == exact.values.keys()
    found = (0.0, "nowhere")
    for name, wanted in exact.values.items():
        value = run.values[name]
        assert value.shape == wanted.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(wanted.shape)}"
        scale = wanted.double().square().mean().sqrt().clamp(min=1e-3)
        error = float((value.double() - wanted.double()).square().mean().sqrt() / scale)
        found = max(found, (error if error == error else float("inf"), name))
    return found


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Neither graphs nor reports of other tests."""
    torch._dynamo.reset()
    fastres.compile_report(clear=True)
    yield
    torch._dynamo.reset()


def make_copies_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let networks that are too small for it go from NCHW to channels_last."""
    monkeypatch.setattr(layout_of_graphs, "_COPY_COST", 0)
    monkeypatch.setattr(layout_of_graphs, "_CALLS_COST", 0)


def draw(
    make: Callable[[], nn.Module], shapes: list[tuple[int, ...]], key: str, *, off_zero: bool = False
) -> Iterator[tuple[nn.Module, list[list[Tensor]]]]:
    """Networks and their inputs, float64: two training steps and an evaluation.

    Args:
        off_zero: the biases of normalisations are 1.5 to 2.5 away from 0, so that few activations have an input near
            it: each channel has some elements on the other side. Gradients are sums that cancel more then.
    """
    for attempt in itertools.count():
        gen = oracle.generator(key, attempt)
        torch.manual_seed(int(torch.randint(2**31, (), generator=gen)))
        model = make().double()
        with torch.no_grad():
            for name, t in [*model.named_parameters(), *model.named_buffers()]:
                if t.dim() == 1 and t.is_floating_point():  # no weight of 1, no bias of 0
                    t += (0.2 if "var" not in name else 0.0) * torch.randn(t.shape, generator=gen, dtype=t.dtype)
            for module in model.modules() if off_zero else ():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.bias is not None:
                    size = 1.5 + torch.rand(module.bias.shape, generator=gen, dtype=torch.float64)
                    module.bias.copy_(size * torch.randn(size.shape, generator=gen, dtype=size.dtype).sign())
        yield model, [[torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes] for _ in range(3)]


def prepared(
    model: nn.Module, inputs: list[list[Tensor]], dtype: torch.dtype, layout: str
) -> tuple[nn.Module, list[list[Tensor]]]:
    """Copies in this dtype and memory format."""
    format = oracle.LAYOUTS[layout]
    model = copy.deepcopy(model).to(dtype)
    model = model.to(memory_format=format) if layout == "channels_last" else model

    def of(t: Tensor) -> Tensor:
        t = t.detach().clone().to(dtype)
        return t.contiguous(memory_format=format) if t.dim() == 4 else t

    return model, [[of(t) for t in tensors] for tensors in inputs]


def _strides(t: Tensor) -> list[int]:
    """Those that say something: an axis of size 1 may have any."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def check(
    make: Callable[[], nn.Module],
    shapes: list[tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float64,
    layout: str = "nchw",
    autocast: torch.dtype | None = None,
    differentiable: bool = False,
    off_zero: bool = False,
    **options: Any,
) -> list[GraphReport]:
    """Compare the compiled network with plain PyTorch; the reports of its graphs, training first.

    Args:
        shapes: of the inputs.
        dtype: of network and inputs. The oracle is plain PyTorch in float64; where that is not the dtype, plain PyTorch
            in the dtype itself says how large an error is right.
        off_zero: as `draw`; for networks that are too large to have no activation at a kink otherwise.
        options: of the backend.
    """
    how: dict[str, Any] = {"autocast": autocast, "differentiable": differentiable}
    key = f"{getattr(make, '__qualname__', make)} {shapes} {dtype} {layout} {autocast}"
    half = autocast is not None
    errors: list[tuple[float, str, float]] = []
    reports: list[GraphReport] = []
    for model, inputs in itertools.islice(draw(make, shapes, key, off_zero=off_zero), _DRAWS):
        model, inputs = prepared(*prepared(model, inputs, dtype, layout), torch.float64, layout)
        exact_model, exact_inputs = prepared(model, inputs, torch.float64, layout)
        with _Decisions() as exactly:
            exact = train_and_evaluate(exact_model, exact_model, exact_inputs, differentiable=differentiable)
        eager_model, eager_inputs = prepared(model, inputs, dtype, layout)
        with _Decisions() as rounded:
            eager = train_and_evaluate(eager_model, eager_model, eager_inputs, **how)
        if dtype != torch.float64 and not half and _doubtful(exactly, rounded):
            continue
        ours_model, ours_inputs = prepared(model, inputs, dtype, layout)
        with fresh():
            compiled = torch.compile(ours_model, backend=fastres.backend.fastres, options={"smallest": 0} | options)
            ours = train_and_evaluate(ours_model, compiled, ours_inputs, **how)
            reports = fastres.compile_report()
        for name, value in eager.values.items():
            assert ours.values[name].dtype == value.dtype, name
            assert _strides(ours.values[name]) == _strides(value), f"{name}: strides {ours.values[name].stride()}"
        errors.append((*worst(ours, exact), worst(eager, exact)[0]))
        if not half or len(errors) == _HALF_DRAWS:
            break
    else:
        raise AssertionError(f"no input without an activation at a kink in {_DRAWS} draws")
    error, where, _ = max(errors)
    allowed = EXACT if dtype == torch.float64 else 1e-5 + _TIMES * max(e for *_, e in errors)
    assert error <= allowed, f"{where}: error {error:.3e}, allowed {allowed:.3e}; FASTRES_TEST_SEED={oracle.SEED}"
    return reports
