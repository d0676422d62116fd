"""A compiled network against the same network in plain PyTorch, float64: two training steps, and evaluation.

In float64 both sides agree to 1e-9, whatever a ReLU does. In float32 an element whose ReLU input is 0 up to rounding
would pass a gradient on one side only, so inputs are drawn until there is none.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastres
from fastres.backend import GraphReport
from tests import oracle

EXACT = 1e-9
_DRAWS = 20
Drawn = tuple[nn.Module, list[list[Tensor]]]
# Of the largest value: closer to a kink than this float32 cannot tell the side after a few layers.
_NEAR = 1e-6
_KINKS = {
    "aten::relu": (0.0,), "aten::relu_": (0.0,), "aten::clamp": (0.0,), "aten::clamp_": (0.0,),
    "aten::threshold": (0.0,), "aten::leaky_relu": (0.0,), "aten::leaky_relu_": (0.0,), "aten::hardtanh": (0.0, 6.0),
    "aten::hardtanh_": (0.0, 6.0), "aten::hardswish": (-3.0, 3.0), "aten::hardswish_": (-3.0, 3.0),
    "aten::clamp_min": (0.0,), "aten::clamp_min_": (0.0,), "aten::relu6": (0.0, 6.0),
}  # fmt: skip


class _Kinks(TorchDispatchMode):
    """Notes whether an activation's input comes close to one of its kinks."""

    near = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kink in _KINKS.get(func._schema.name, ()):
            z = args[0].double()
            self.near |= bool(((z - kink).abs() < _NEAR * z.abs().max().clamp(min=1)).any())
        return func(*args, **(kwargs or {}))


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
        sum(((t.double() ** 2).sum() / t.numel() for t in leaves), torch.zeros(())).backward()
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


def draw(
    make: Callable[[], nn.Module], shapes: list[tuple[int, ...]], key: str
) -> Iterator[tuple[nn.Module, list[list[Tensor]]]]:
    """Networks and their inputs, float64: two training steps and an evaluation."""
    for attempt in itertools.count():
        gen = oracle.generator(key, attempt)
        torch.manual_seed(int(torch.randint(2**31, (), generator=gen)))
        model = make().double()
        with torch.no_grad():
            for name, t in [*model.named_parameters(), *model.named_buffers()]:
                if t.dim() == 1 and t.is_floating_point():  # no weight of 1, no bias of 0
                    t += (0.2 if "var" not in name else 0.0) * torch.randn(t.shape, generator=gen, dtype=t.dtype)
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
    **options: Any,
) -> list[GraphReport]:
    """Compare the compiled network with plain PyTorch; the reports of its graphs, training first.

    Args:
        shapes: of the inputs.
        dtype: of network and inputs. The oracle is plain PyTorch in float64; where that is not the dtype, plain PyTorch
            in the dtype itself says how large an error is right.
        options: of the backend.
    """
    how: dict[str, Any] = {"autocast": autocast, "differentiable": differentiable}
    key = f"{make} {shapes} {dtype} {layout} {autocast}"
    for model, inputs in itertools.islice(draw(make, shapes, key), _DRAWS):
        model, inputs = prepared(*prepared(model, inputs, dtype, layout), torch.float64, layout)
        with _Kinks() as kinks:
            exact_model, exact_inputs = prepared(model, inputs, torch.float64, layout)
            exact = train_and_evaluate(exact_model, exact_model, exact_inputs, differentiable=differentiable)
        if dtype == torch.float64 or not kinks.near:
            break
    else:
        raise AssertionError(f"no input without an activation at a kink in {_DRAWS} draws")
    eager_model, eager_inputs = prepared(model, inputs, dtype, layout)
    eager = train_and_evaluate(eager_model, eager_model, eager_inputs, **how)
    ours_model, ours_inputs = prepared(model, inputs, dtype, layout)
    with fresh():
        compiled = torch.compile(ours_model, backend=fastres.backend.fastres, options={"smallest": 0} | options)
        ours = train_and_evaluate(ours_model, compiled, ours_inputs, **how)
        reports = fastres.compile_report()
    for name, value in eager.values.items():
        assert ours.values[name].dtype == value.dtype, name
        assert _strides(ours.values[name]) == _strides(value), f"{name}: strides {ours.values[name].stride()}"
    error, where = worst(ours, exact)
    allowed = EXACT if dtype == torch.float64 else 1e-5 + 8 * worst(eager, exact)[0]
    assert error <= allowed, f"{where}: error {error:.3e}, allowed {allowed:.3e}; FASTRES_TEST_SEED={oracle.SEED}"
    return reports
