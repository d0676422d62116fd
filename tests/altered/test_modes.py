"""Modules frozen in part, in other dtypes, under autocast, with saved tensors carried away, recomputed, transformed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils import checkpoint as ckpt

from tests.altered.compare import Draw, Results, backward, descend, infer, observe, problems, record, state, step
from tests.altered.subjects import (
    BASIC,
    BLOCKS,
    BOTTLENECK,
    DIRECT_BASIC,
    NETWORK,
    NORM_ACT,
    PREACTIVATION,
    PROJECTED,
    RESIDUAL,
    SHORTCUT,
    SKIP,
    STEM,
    SUBJECTS,
    each,
    has,
)
from tests.altered.table import Table, check

TABLE = Table()
change, use = TABLE.change, TABLE.use
ALL = (*SUBJECTS, DIRECT_BASIC)


def norms(m: nn.Module) -> list[nn.BatchNorm2d]:
    return [n for n in m.modules() if isinstance(n, nn.BatchNorm2d)]


# --------------------------------------------------------------------------------------------------------------- frozen

CHOICES: dict[str, Callable[[nn.Module], Iterable[nn.Module]]] = {
    "isinstance": norms,
    "exact type": lambda m: [n for n in m.modules() if type(n) is nn.BatchNorm2d],
    "class name": lambda m: [n for n in m.modules() if type(n).__name__ == "BatchNorm2d"],
    "part of the class name": lambda m: [n for n in m.modules() if "BatchNorm" in type(n).__name__],
    "base class": lambda m: [n for n in m.modules() if isinstance(n, nn.modules.batchnorm._BatchNorm)],
    "a running_mean": lambda m: [n for n in m.modules() if hasattr(n, "running_mean")],
    "name": lambda m: [n for k, n in m.named_modules() if "bn" in k or "norm" in k],
}
FREEZES: dict[str, Callable[[nn.Module], object]] = {
    "eval()": lambda n: n.eval(),
    "eval() and requires_grad_(False)": lambda n: n.eval().requires_grad_(False),
    "training = False": lambda n: setattr(n, "training", False),
    "requires_grad_(False)": lambda n: n.requires_grad_(False),
    "momentum = 0": lambda n: setattr(n, "momentum", 0.0),
    "train() forgotten": lambda n: setattr(n, "train", lambda mode=True: n) or n.eval(),
}
for (choice, choose), (name, freeze) in itertools.product(CHOICES.items(), FREEZES.items()):
    if name in ("eval() and requires_grad_(False)",) or choice == "isinstance":

        @change(f"norms chosen by {choice} frozen by {name}", needs=lambda m, choose=choose: bool(list(choose(m))))
        def _(m: nn.Module, draw: Draw, choose: Any = choose, freeze: Any = freeze) -> None:
            for n in choose(m):
                freeze(n)


for index in range(4):
    for name in ("eval()", "requires_grad_(False)", "momentum = 0"):

        @change(
            f"norm {index} alone frozen by {name}",
            (*BLOCKS, RESIDUAL, PREACTIVATION, NETWORK, DIRECT_BASIC),
            needs=lambda m, index=index: len(norms(m)) > index,
        )
        def _(m: nn.Module, draw: Draw, index: int = index, freeze: Any = FREEZES[name]) -> None:
            freeze(norms(m)[index])


@change("all but one norm frozen", (*BLOCKS, RESIDUAL, PREACTIVATION, NETWORK))
def _(m: nn.Module, draw: Draw) -> None:
    for n in norms(m)[1:]:
        n.eval()


@use("frozen norms inside train(), call after call", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    for index in range(3):
        m.train()
        if index != 1:
            for n in norms(m):
                n.eval()
        step(m, draw, results, f"step {index}", index)
        descend(m)
    infer(m, draw, results, "end")
    return results


@change("a train() that freezes", (STEM, *BLOCKS, NETWORK, RESIDUAL, PREACTIVATION))
def _(m: nn.Module, draw: Draw) -> None:
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        nn.Module.train(self, mode)
        for n in norms(self):
            n.eval()
        return self

    m.train = train.__get__(m)
    m.train()


@change("the module in evaluation, its norms in training", ALL)
def _(m: nn.Module, draw: Draw) -> None:
    m.eval()
    for n in norms(m):
        n.train()


@change("relus in evaluation", needs=has(nn.ReLU))
def _(m: nn.Module, draw: Draw) -> None:
    for _, _, relu in each(m, nn.ReLU):
        relu.eval()


@change("all parameters frozen", ALL)
def _(m: nn.Module, draw: Draw) -> None:
    m.requires_grad_(False)


@change("convolutions frozen", ALL, needs=has(nn.Conv2d))
def _(m: nn.Module, draw: Draw) -> None:
    for _, _, conv in each(m, nn.Conv2d):
        conv.requires_grad_(False)


for index in range(6):

    @change(
        f"only parameter {index} trained",
        (*BLOCKS, SKIP, RESIDUAL, PREACTIVATION),
        needs=lambda m, index=index: len(list(m.parameters())) > index,
    )
    def _(m: nn.Module, draw: Draw, index: int = index) -> None:
        m.requires_grad_(False)
        list(m.parameters())[index].requires_grad_()


@use("an input that wants no gradient", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    step(m, draw, results, "step", x=draw.x().detach())
    return results


@use("gradients of some inputs alone", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    x = draw.x()
    y = m(x)
    for i, wanted in enumerate(([x], list(m.parameters())[:1], list(m.parameters())[-1:])):
        record(results, f"{i}", gradients=torch.autograd.grad(y, wanted, draw.dy(y), retain_graph=True))
    return results


@use("training without gradients", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    with torch.no_grad():
        record(results, "step", y=m(draw.x()))
    state(results, "step", m)
    return results


@use("inference mode", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    with torch.inference_mode():
        record(results, "training", y=m(draw.x()))
        record(results, "evaluation", y=m.eval()(draw.x()))
    m.train()
    return results | observe(m, draw)


@use("a tensor of inference mode as input of evaluation", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    with torch.inference_mode():
        x = draw.x().detach().clone()
    with torch.no_grad():
        return {"y": m.eval()(x).clone()}


@use("a tensor of inference mode as input of training", (*BLOCKS, STEM), refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    with torch.inference_mode():
        x = draw.x().detach().clone()
    y = m(x)
    backward(y, draw)
    return {"y": y.detach().clone()}


@use("an inference-mode module trained afterwards", (BASIC, NORM_ACT), refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    with torch.inference_mode():
        m = copy.deepcopy(m)
        m(draw.x())
    return observe(m, draw)


# ----------------------------------------------------------------------------------------------------- dtypes, autocast


def away_from_kinks(m: nn.Module) -> nn.Module:
    """Let hardly a ReLU clip: with 8 bits so many would flip that gradients would say nothing."""
    for n in norms(m):
        n.bias.data += 16
    return m


change("double()", ALL, exact=False)(lambda m, draw: setattr(draw, "dtype", torch.float64) or m.double())
for dtype in (torch.bfloat16, torch.float16):

    @use(f"weights of {dtype}", ALL, low_precision=True)
    def _(m: nn.Module, draw: Draw, dtype: torch.dtype = dtype) -> Results:
        results: Results = {}
        draw.lower(away_from_kinks(m), dtype)
        step(m, draw, results, "step")
        infer(m, draw, results, "evaluation")
        return results

    @use(f"autocast to {dtype}", ALL, low_precision=True)
    def _(m: nn.Module, draw: Draw, dtype: torch.dtype = dtype) -> Results:
        results: Results = {}
        away_from_kinks(m)
        with draw.autocast(dtype):
            step(m, draw, results, "step")
            m.eval()
            step(m, draw, results, "evaluation", 1)
            infer(m, draw, results, "inference", 1)
        return results

    @use(f"{dtype} with norms of float32", ALL, low_precision=True, refused=(RuntimeError,))
    def _(m: nn.Module, draw: Draw, dtype: torch.dtype = dtype) -> Results:
        results: Results = {}
        draw.lower(away_from_kinks(m), dtype)
        if draw.dtype is not torch.float64:
            for n in norms(m):
                n.float()
        step(m, draw, results, "step")
        return results


@use("autocast switched off within", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        return observe(m, draw)


@use("autocast without its cache", BLOCKS, low_precision=True)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    with draw.autocast(torch.bfloat16, cache_enabled=False):
        step(away_from_kinks(m), draw, results, "step")
    return results


@use("float64 under autocast", ALL, exact=False)
def _(m: nn.Module, draw: Draw) -> Results:
    m.double()
    draw.dtype = torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        return observe(m, draw)


@use("a float64 input under autocast", ALL, exact=False, refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    draw.dtype = torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        return observe(m, draw)


@use("a bfloat16 input under autocast", ALL, low_precision=True)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    draw.stored = torch.bfloat16
    away_from_kinks(m)
    with draw.autocast(torch.bfloat16):
        x = draw.x()
        x = x if draw.dtype is torch.float64 else x.detach().bfloat16().requires_grad_()
        step(m, draw, results, "step", x=x)
    return results


@use("GradScaler", (STEM, *BLOCKS))
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(m.parameters(), 0.05)
    scaler.scale(m(draw.x()).square().mean()).backward()
    scaler.unscale_(optimizer)
    state(results, "step", m)
    scaler.step(optimizer)
    scaler.update()
    infer(m, draw, results, "end")
    return results


# -------------------------------------------------------------------------------------------------------- saved tensors


def through_numpy(t: Tensor) -> Any:
    return np.ascontiguousarray(t.detach().numpy())


SAVED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "through numpy": (through_numpy, torch.from_numpy),
    "made contiguous": (lambda t: t.contiguous(), lambda t: t),
    "made channels_last": (
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, lambda t: t,
    ),
    "cloned": (lambda t: t.clone(), lambda t: t),
    "transposed in memory": (lambda t: t.detach().mT.contiguous().mT if t.dim() > 1 else t, lambda t: t),
    "as lists": (lambda t: (t.tolist(), t.dtype, t.shape), lambda v: torch.tensor(v[0], dtype=v[1]).reshape(v[2])),
    "by index into a list": (lambda t: [t.detach().clone()], lambda v: v[0]),
}  # fmt: skip
for name, (pack, unpack) in SAVED.items():
    for layout in ("nchw", "channels_last"):

        @use(f"saved tensors {name}, input {layout}", ALL)
        def _(m: nn.Module, draw: Draw, pack: Any = pack, unpack: Any = unpack, layout: str = layout) -> Results:
            results: Results = {}
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                step(m, draw, results, "step", x=draw.x(layout=layout))
                m.eval()
                step(m, draw, results, "evaluation", 1, x=draw.x(1, layout=layout))
            return results


@use("save_on_cpu", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    with torch.autograd.graph.save_on_cpu():
        return observe(m, draw)


@use("saved tensors on disk", BLOCKS)
def _(m: nn.Module, draw: Draw) -> Results:
    import io

    def pack(t: Tensor) -> bytes:
        file = io.BytesIO()
        torch.save(t, file)
        return file.getvalue()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda b: torch.load(io.BytesIO(b))):
        return observe(m, draw)


@use("anomaly detection", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    with torch.autograd.set_detect_anomaly(True):
        return observe(m, draw)


@use("backward twice through one graph", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    x = draw.x()
    y = m(x)
    y.backward(draw.dy(y), retain_graph=True)
    y.backward(draw.dy(y, 1))
    record(results, "step", x=x.grad)
    state(results, "step", m)
    return results


@use("backward twice through a graph that is gone", (*BLOCKS, STEM, SKIP, NORM_ACT), refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    y = m(draw.x())
    y.backward(draw.dy(y))
    y.backward(draw.dy(y))
    return {}


@use("two forwards, then two backwards", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    m.eval()
    xs = [draw.x(i) for i in range(2)]
    ys = [m(x) for x in xs]
    for i in (1, 0):
        ys[i].backward(draw.dy(ys[i], i))
    record(results, "evaluation", x=[x.grad for x in xs])
    state(results, "evaluation", m)
    return results


@use("the gradient of a gradient", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    for mode in (m.train(), m.eval()):
        x = draw.x()
        (g,) = torch.autograd.grad(mode(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        record(results, f"training {m.training}", x=x.grad)
        state(results, f"training {m.training}", m)
    return results


@use("gradients in batches", (*BLOCKS, NORM_ACT, SKIP, STEM))
def _(m: nn.Module, draw: Draw) -> Results:
    x = draw.x()
    y = m.eval()(x)
    batch = torch.stack([draw.dy(y, i) for i in range(3)])
    (g,) = torch.autograd.grad(y, x, batch, is_grads_batched=True)
    return {"g": g.detach()}


@use("a strided gradient of the output", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    x = draw.x()
    y = m(x)
    dy = draw.dy(y)
    y.backward(dy.mT.contiguous().mT)
    record(results, "strided", x=x.grad)
    x.grad = None
    m(x).sum().backward()  # its gradient is expanded: strides of 0
    record(results, "expanded", x=x.grad)
    state(results, "step", m)
    return results


def gradient_strides(m: nn.Module, draw: Draw) -> Results:
    backward(m(draw.x(layout="nchw")), draw)
    return {name: p.grad is None or p.grad.stride() == p.stride() for name, p in m.named_parameters()}


use("gradients in the strides of their parameters", ALL)(gradient_strides)


@use("gradients in the strides of channels_last parameters", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    return gradient_strides(m.to(memory_format=torch.channels_last), draw)


# ----------------------------------------------------------------------------------------------- activation checkpoints


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, x: Tensor) -> Tensor:
        return ckpt.checkpoint(self.inner, x, **self.options)


def keep_convolutions() -> Any:
    return ckpt.create_selective_checkpoint_contexts([torch.ops.aten.convolution.default])


def prefer_recompute() -> Any:
    return ckpt.create_selective_checkpoint_contexts(
        lambda context, op, *args, **kwargs: ckpt.CheckpointPolicy.PREFER_RECOMPUTE
    )


for name, options in {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "without random state": {"use_reentrant": False, "preserve_rng_state": False},
    "selective, convolutions kept": {"use_reentrant": False, "context_fn": keep_convolutions},
    "selective, all recomputed": {"use_reentrant": False, "context_fn": prefer_recompute},
    "without early stop": {"use_reentrant": False, "early_stop": False},
}.items():
    change(f"checkpoint, {name}", ALL)(lambda m, draw, options=options: Checkpointed(m, **options))


@use("checkpoint_sequential", (BASIC, BOTTLENECK))
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    stack = nn.Sequential(m, copy.deepcopy(m), nn.ReLU())
    x = draw.x()
    y = ckpt.checkpoint_sequential(stack, 2, x, use_reentrant=False)
    backward(y, draw)
    record(results, "step", y=y, x=x.grad)
    state(results, "step", stack)
    return results


@change("checkpoint_wrapper", BLOCKS)
def _(m: nn.Module, draw: Draw) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(m)


@use("checkpoint under autocast", BLOCKS, low_precision=True)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    with draw.autocast(torch.bfloat16):
        step(Checkpointed(away_from_kinks(m), use_reentrant=False), draw, results, "step")
    return results


# ----------------------------------------------------------------------------------------------------------- torch.func


def parts(m: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return (
        {k: p.detach() for k, p in m.named_parameters()},
        {k: b.detach().clone() for k, b in m.named_buffers()},
    )


def loss_of(m: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    _, buffers = parts(m)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        y = functional_call(m, (params, buffers), (x,))
        return (y * y + y).sum()

    return loss


def count_nothing(m: nn.Module) -> None:
    """torch.func refuses to count a batch in place; its own helper takes the statistics away."""
    if m.training:
        torch.func.replace_all_batch_norm_modules_(m)


@use("torch.func.grad in training, statistics in place", ALL, refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    return {"x": grad(lambda x: m(x).square().sum())(draw.x().detach())}


MODES = {"training": True, "evaluation": False}
for mode, training in MODES.items():

    @use(f"functional_call in {mode}", ALL)
    def _(m: nn.Module, draw: Draw, training: bool = training) -> Results:
        results: Results = {}
        params, buffers = parts(m.train(training))
        params = {k: (p * 1.5).requires_grad_() for k, p in params.items()}
        y = functional_call(m, (params, buffers), (draw.x(),))
        backward(y, draw)
        record(results, "call", y=y, gradients=[p.grad for p in params.values()], buffers=list(buffers.values()))
        with torch.no_grad():
            record(results, "own", y=m.eval()(draw.x()))
        return results

    @use(f"torch.func.grad in {mode}", ALL)
    def _(m: nn.Module, draw: Draw, training: bool = training) -> Results:
        results: Results = {}
        count_nothing(m.train(training))
        params, _ = parts(m)
        gradients, value = grad_and_value(loss_of(m), argnums=(0, 1))(params, draw.x().detach())
        record(results, "grad", params=list(gradients[0].values()), x=gradients[1], value=value)
        record(results, "of x", x=grad(lambda x: m(x).square().sum())(draw.x().detach()))
        return results

    @use(f"torch.func.vjp in {mode}", ALL)
    def _(m: nn.Module, draw: Draw, training: bool = training) -> Results:
        results: Results = {}
        count_nothing(m.train(training))
        y, pull = vjp(m, draw.x().detach())
        record(results, "vjp", y=y, x=pull(draw.dy(y))[0])
        return results

    @use(f"torch.func.jvp in {mode}", ALL)
    def _(m: nn.Module, draw: Draw, training: bool = training) -> Results:
        results: Results = {}
        count_nothing(m.train(training))
        y, dy = jvp(m, (draw.x().detach(),), (draw.x(1).detach(),))
        record(results, "jvp", y=y, dy=dy)
        return results

    @use(f"dual numbers in {mode}", ALL)
    def _(m: nn.Module, draw: Draw, training: bool = training) -> Results:
        results: Results = {}
        with forward_ad.dual_level():
            y = m.train(training)(forward_ad.make_dual(draw.x().detach(), draw.x(1).detach()))
            record(results, "dual", y=list(forward_ad.unpack_dual(y)))
        return results

    @use(f"linearize in {mode}", (PROJECTED, NORM_ACT), refused=(RuntimeError,))
    def _(m: nn.Module, draw: Draw, training: bool = training) -> Results:
        results: Results = {}
        count_nothing(m.train(training))
        y, push = linearize(m, draw.x().detach())
        record(results, "linearize", y=y, dy=push(draw.x(1).detach()))
        return results

    @use(f"Jacobian by torch.autograd.functional in {mode}", (STEM,))
    def _(m: nn.Module, draw: Draw, training: bool = training) -> Results:
        results: Results = {}
        for vectorize in (False, True):
            j = torch.autograd.functional.jacobian(m.train(training), draw.x().detach(), vectorize=vectorize)
            record(results, f"{vectorize}", j=j)
        return results


for name, jacobian in {"jacrev": jacrev, "jacfwd": jacfwd}.items():

    @use(f"torch.func.{name}", (STEM, *BLOCKS, NORM_ACT, SKIP))
    def _(m: nn.Module, draw: Draw, jacobian: Any = jacobian) -> Results:
        params, _ = parts(m.eval())
        loss = loss_of(m)
        first = dict(list(params.items())[-2:])

        x = draw.x().detach()

        def f(some: dict[str, Tensor]) -> Tensor:
            return loss({**params, **some}, x)

        results: Results = {}
        record(results, "loss", jacobian=list(jacobian(f)(first).values()))
        return results


@use("torch.func.hessian", (NORM_ACT, BASIC))
def _(m: nn.Module, draw: Draw) -> Results:
    params, _ = parts(m.eval())
    key, x = list(params)[-1], draw.x().detach()

    def f(p: Tensor) -> Tensor:
        y = functional_call(m, {key: p}, (x,))
        return y.square().sum()

    return {"hessian": hessian(f)(params[key]).detach()}


@use("vmap over images", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    m.eval()
    x = draw.x(shape=(3, *draw.subject.shape()), layout="nchw").detach()
    return {"y": vmap(m)(x).detach()}


@use("vmap in training", (*BLOCKS, NORM_ACT), refused=(RuntimeError, ValueError))
def _(m: nn.Module, draw: Draw) -> Results:
    return {"y": vmap(m)(draw.x(shape=(3, *draw.subject.shape()), layout="nchw").detach()).detach()}


@use("vmap in training without statistics", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    torch.func.replace_all_batch_norm_modules_(m)
    return {"y": vmap(m)(draw.x(shape=(3, *draw.subject.shape()), layout="nchw").detach()).detach()}


@use("per-sample gradients", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    params, _ = parts(m.eval())
    loss = loss_of(m)
    per_sample = vmap(grad(lambda p, x: loss(p, x.unsqueeze(0))), in_dims=(None, 0))
    results: Results = {}
    record(results, "per sample", gradients=list(per_sample(params, draw.x().detach()).values()))
    return results


@use("an ensemble by stack_module_state", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    models = [m.eval()] + [copy.deepcopy(m) for _ in range(2)]
    for i, other in enumerate(models):
        for p in other.parameters():
            p.data.mul_(1 + 0.2 * i)
    params, buffers = stack_module_state(models)
    base = copy.deepcopy(m).to("meta")

    def call(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (p, b), (x,))

    return {"y": vmap(call, in_dims=(0, 0, None))(params, buffers, draw.x().detach()).detach()}


# ------------------------------------------------------------------------------------------- where PyTorch is not right


@TABLE.every()
def test_a_module_in_another_mode_does_what_the_plain_one_does(row, subject):
    check(row, subject)


# A shortcut that is called alone is PyTorch's own two modules.
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s is not SHORTCUT], ids=str)
def test_a_training_step_between_an_evaluations_forward_and_backward_changes_nothing(subject):
    """PyTorch reads the running statistics when it goes back, which the training step has moved by then."""
    ours, plain, exact = subject.make_fused(), subject.make_plain(), subject.make_plain().double()
    draw, found = Draw(subject, ("between",)), []
    for model, x, between in (
        (ours, draw.x(), True),
        (plain, draw.x(), False),
        (exact, draw.x().detach().double().requires_grad_(), False),
    ):
        y = model.eval()(x)
        if between:
            model.train()(draw.x(1))
        backward(y, draw)
        found.append((y, x.grad))
    results: list[Results] = []
    for y, g in found:
        results.append({})
        record(results[-1], "step", y=y, x=g)
    assert not problems(subject, *results)
