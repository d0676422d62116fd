"""Hooks of every kind on every child, on the module itself, on all modules, on tensors; and what watches by them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tests.altered.compare import Draw, Results, backward, observe, record, state, step
from tests.altered.subjects import (
    BLOCKS,
    DIRECT_BASIC,
    NETWORK,
    NORM_ACT,
    PREACTIVATION,
    RESIDUAL,
    SKIP,
    STEM,
    SUBJECTS,
    each,
    has,
)
from tests.altered.table import Table, check

TABLE = Table()
change, use = TABLE.change, TABLE.use

KINDS: dict[str, type[nn.Module]] = {"convolutions": nn.Conv2d, "norms": nn.BatchNorm2d, "relus": nn.ReLU}

Hook = Callable[[nn.Module, Draw], Any]


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


HOOKS: dict[str, Hook] = {
    "forward hook that looks": lambda m, draw: m.register_forward_hook(
        lambda m, args, y: draw.see("output", y) or draw.see("input", args[0])
    ),
    "forward hook that doubles": lambda m, draw: m.register_forward_hook(lambda m, args, y: y * 2),
    "forward hook with keywords": lambda m, draw: m.register_forward_hook(
        lambda m, args, kwargs, y: draw.see(f"{len(args)} arguments, {sorted(kwargs)}", y), with_kwargs=True
    ),
    "forward hook that is always called": lambda m, draw: m.register_forward_hook(
        lambda m, args, y: draw.see("output", y), always_call=True
    ),
    "two forward hooks, one prepended": lambda m, draw: [
        m.register_forward_hook(lambda m, args, y: y + 1),
        m.register_forward_hook(lambda m, args, y: y * 2, prepend=True),
    ],
    "pre-hook that looks": lambda m, draw: m.register_forward_pre_hook(lambda m, args: draw.see("input", args[0])),
    "pre-hook that doubles": lambda m, draw: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "pre-hook with keywords": lambda m, draw: m.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
    ),
    "hook on the output's gradient": lambda m, draw: m.register_forward_hook(
        lambda m, args, y: y.register_hook(lambda g: draw.see("gradient", g)) and None if y.requires_grad else None
    ),
    "hook that detaches": lambda m, draw: m.register_forward_hook(lambda m, args, y: y.detach() + 0 * y),
    "a hook, removed": lambda m, draw: m.register_forward_hook(lambda m, args, y: y * 2).remove(),
}  # fmt: skip
HOOKS["hook that writes in place"] = lambda m, draw: m.register_forward_hook(
    lambda m, args, y: (y.data.mul_(0.5), None)[1]
)
BACKWARD: dict[str, Hook] = {
    "full backward hook that looks": lambda m, draw: m.register_full_backward_hook(
        lambda m, gi, go: draw.see("gradients", go[0]) or draw.see("of the input", gi[0])
    ),
    "full backward hook that doubles": lambda m, draw: m.register_full_backward_hook(
        lambda m, gi, go: tuple(None if g is None else g * 2 for g in gi)
    ),
    "backward pre-hook that looks": lambda m, draw: m.register_full_backward_pre_hook(
        lambda m, go: draw.see("gradient", go[0])
    ),
    "backward pre-hook that doubles": lambda m, draw: m.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,)),
    "guided backpropagation": lambda m, draw: m.register_full_backward_hook(
        lambda m, gi, go: tuple(None if g is None else g.clamp(min=0) for g in gi)
    ),
}
DECONVNET: Hook = lambda m, draw: m.register_full_backward_hook(lambda m, gi, go: (go[0].clamp(min=0),))  # noqa: E731
LEGACY: dict[str, Hook] = {
    "backward hook of the old kind": lambda m, draw: m.register_backward_hook(
        lambda m, gi, go: draw.see("gradient", go[0])
    ),
}


def on(kind: type[nn.Module], hook: Hook, *, in_place: bool = True) -> Hook:
    def act(m: nn.Module, draw: Draw) -> None:
        if not in_place:
            for _, _, relu in each(m, nn.ReLU):
                relu.inplace = False
        for _, _, child in each(m, kind):
            hook(child, draw)

    return act


for kind, module_class in KINDS.items():
    for name, hook in HOOKS.items():
        change(f"{name}, on {kind}", needs=has(module_class))(on(module_class, hook))
    for name, hook in (BACKWARD | LEGACY).items():
        # torchvision's blocks add to the last norm's output in place, which PyTorch then refuses.
        refused = (RuntimeError,) if module_class is nn.BatchNorm2d else ()
        change(f"{name}, on {kind}", needs=has(module_class), refused=refused)(on(module_class, hook, in_place=False))
change("deconvnet, on relus", needs=has(nn.ReLU))(on(nn.ReLU, DECONVNET, in_place=False))
for name, hook in BACKWARD.items():

    @change(f"{name}, on bn1 alone", (STEM, *BLOCKS, RESIDUAL, PREACTIVATION))
    def _(m: nn.Module, draw: Draw, hook: Hook = hook) -> None:
        m.relu.inplace = False
        hook(m.bn1, draw)


# A ReLU in place behind a full backward hook: PyTorch refuses.
change("guided backpropagation, relus in place", (*BLOCKS, STEM), refused=(RuntimeError,))(
    on(nn.ReLU, BACKWARD["guided backpropagation"])
)

for name, hook in (HOOKS | BACKWARD).items():
    change(f"{name}, on the module itself")(hook)

for name in ("forward hook that doubles", "pre-hook that doubles", "forward hook that looks"):
    for child in (
        "conv1",
        "bn1",
        "conv2",
        "bn2",
        "conv3",
        "bn3",
        "downsample",
        "shortcut",
        "downsample.0",
        "downsample.1",
        "relu",
    ):

        def present(plain: nn.Module, child: str = child) -> bool:
            with contextlib.suppress(AttributeError):
                return isinstance(plain.get_submodule(child), nn.Module)
            return False

        columns = [s for s in (STEM, *BLOCKS, RESIDUAL, PREACTIVATION) if present(s.make_plain())]
        change(f"{name}, on {child} alone", columns)(
            lambda m, draw, child=child, hook=HOOKS[name]: hook(m.get_submodule(child), draw)
        )
change("backward pre-hook that doubles, on downsample", needs=lambda m: getattr(m, "downsample", None) is not None)(
    lambda m, draw: BACKWARD["backward pre-hook that doubles"](m.downsample, draw)
)


# -------------------------------------------------------------------------------------------------- hooks on parameters


@change("hooks on parameters' gradients")
def _(m: nn.Module, draw: Draw) -> None:
    for p in m.parameters():
        p.register_hook(lambda g: g * 2)


@use("hooks after accumulation, an optimizer in backward")
def _(m: nn.Module, draw: Draw) -> Results:
    def descend(p: Tensor) -> None:
        p.data.add_(p.grad, alpha=-0.05)
        p.grad = None

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(descend)
    return observe(m, draw)


@use("hooks on many gradients")
def _(m: nn.Module, draw: Draw) -> Results:
    torch.autograd.graph.register_multi_grad_hook(
        list(m.parameters()), lambda grads: draw.see("gradients", len([g for g in grads if g is not None]))
    )
    results: Results = {}
    step(m, draw, results, "step")
    return results


@use("hooks on the input's and the output's gradient")
def _(m: nn.Module, draw: Draw) -> Results:
    x = draw.x()
    x.register_hook(lambda g: g * 3)
    y = m(x)
    y.retain_grad()
    y.register_hook(lambda g: g.clamp(min=0))
    results: Results = {}
    backward(y, draw)
    record(results, "step", x=x.grad, y=y.grad)
    state(results, "step", m)
    return results


@change("hooks on the state_dict")
def _(m: nn.Module, draw: Draw) -> None:
    def halve(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
        for key in state:
            state[key] = state[key] / 2 if state[key].is_floating_point() else state[key]

    for _, _, child in each(m, nn.Conv2d, nn.BatchNorm2d):
        child.register_state_dict_post_hook(halve)


@use("hooks on loading")
def _(m: nn.Module, draw: Draw) -> Results:
    saved = m.state_dict()
    for _, _, child in each(m, nn.Conv2d, nn.BatchNorm2d):
        child.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *rest: state.update({prefix + "weight": state[prefix + "weight"] * 2})
        )
        child.register_load_state_dict_post_hook(lambda module, keys: draw.see("loaded", type(module).__name__))
    m.load_state_dict(saved)
    return observe(m, draw)


# ------------------------------------------------------------------------------------------------- hooks on all modules

GLOBAL: dict[str, Callable[[Draw, Callable[[nn.Module], bool]], Any]] = {
    "forward": lambda draw, ours: nn.modules.module.register_module_forward_hook(
        lambda m, args, y: draw.see(type(m).__name__, y) if ours(m) else None
    ),
    "forward, doubling": lambda draw, ours: nn.modules.module.register_module_forward_hook(
        lambda m, args, y: y * 2 if ours(m) else None
    ),
    "forward, always called": lambda draw, ours: nn.modules.module.register_module_forward_hook(
        lambda m, args, y: draw.see(type(m).__name__, y) if ours(m) else None, always_call=True
    ),
    "before": lambda draw, ours: nn.modules.module.register_module_forward_pre_hook(
        lambda m, args: (args[0] + 1,) if ours(m) else None
    ),
    "backward": lambda draw, ours: nn.modules.module.register_module_full_backward_hook(
        lambda m, gi, go: draw.see(type(m).__name__, go[0]) if ours(m) else None
    ),
    "before backward": lambda draw, ours: nn.modules.module.register_module_full_backward_pre_hook(
        lambda m, go: (go[0] * 2,) if ours(m) else None
    ),
}

LEAVES = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)

for name, register in GLOBAL.items():

    @use(f"hooks on all modules: {name}", refused=(RuntimeError,) if "backward" in name else ())
    def _(m: nn.Module, draw: Draw, register: Any = register) -> Results:
        for _, _, relu in each(m, nn.ReLU):
            relu.inplace = False
        handle = register(draw, lambda module: type(module) in LEAVES)
        try:
            return observe(m, draw)
        finally:
            handle.remove()


@use("hooks on all parameters' registration")
def _(m: nn.Module, draw: Draw) -> Results:
    handle = nn.modules.module.register_module_parameter_registration_hook(
        lambda module, name, p: nn.Parameter(p.detach() * 2)
    )
    try:
        for _, _, child in each(m, nn.Conv2d, nn.BatchNorm2d):
            child.weight = nn.Parameter(child.weight.detach().clone())
    finally:
        handle.remove()
    return observe(m, draw)


# --------------------------------------------------------------------------------------------------- methods of classes


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def class_patch(module_class: type[nn.Module]) -> Callable[[nn.Module, Draw], Results]:
    def act(m: nn.Module, draw: Draw) -> Results:
        plain = module_class.forward
        with patched(module_class, "forward", lambda self, x: plain(self, x) * 2):
            return observe(m, draw)

    return act


for kind, module_class in KINDS.items():
    use(f"forward of the class of {kind} replaced", needs=has(module_class))(class_patch(module_class))


@use("nn.Module.__call__ of a class replaced")
def _(m: nn.Module, draw: Draw) -> Results:
    plain = nn.BatchNorm2d.__call__

    def called(self: nn.Module, *args: Any) -> Any:
        return plain(self, *args) + 1

    with patched(nn.BatchNorm2d, "__call__", called):
        return observe(m, draw)


for function in ("conv2d", "batch_norm", "relu"):

    @use(f"F.{function} replaced, as counters do")
    def _(m: nn.Module, draw: Draw, function: str = function) -> Results:
        plain = getattr(F, function)
        with patched(F, function, lambda *args, **kwargs: plain(*args, **kwargs) * 2):
            return observe(m, draw)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y * 2 if func is F.batch_norm else y


@use("a mode over functions that alters F.batch_norm")
def _(m: nn.Module, draw: Draw) -> Results:
    with Doubling():
        return observe(m, draw)


# --------------------------------------------------------------------------------------------------------- what watches


@use("FlopCounterMode", (*SUBJECTS, DIRECT_BASIC, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    for mode in (m.train(), m.eval()):
        counter = FlopCounterMode(display=False)
        with counter:
            backward(mode(draw.x()), draw)
        results[f"training {m.training}"] = counter.get_total_flops()
    counter = FlopCounterMode(m, display=False)
    with counter, torch.no_grad():
        m(draw.x())
    # Of the modules that have work; the name of ours differs.
    results["by module"] = sorted(sum(v.values()) for k, v in counter.get_flop_counts().items() if v and "." in k)
    return results


@use("Grad-CAM on the stages", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> Results:
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, y: Tensor) -> None:
        kept["activation"] = y
        y.register_hook(lambda g: kept.update(gradient=g))

    for block in (m.layer1[0], m.layer2[0], m.layer3[0], m.layer2[0].conv2, m.layer1[0].bn2, m.layer1[0].relu):
        handle = block.register_forward_hook(keep)
        m.eval()(draw.x())[:, 1].sum().backward()
        cam = (kept["gradient"].mean((2, 3), keepdim=True) * kept["activation"]).sum(1).relu()
        draw.see("cam", cam)
        handle.remove()
    return {}


@use("a summary of every module's output", (NETWORK, STEM, *BLOCKS, RESIDUAL, PREACTIVATION, SKIP, NORM_ACT))
def _(m: nn.Module, draw: Draw) -> Results:
    names = {module: name for name, module in m.named_modules()}
    for module in m.modules():
        module.register_forward_hook(
            lambda module, args, y: draw.see(
                f"{names[module]} {tuple(y.shape)}", sum(p.numel() for p in module.parameters())
            )
        )
    m(draw.x())
    return {}


@use("activations gathered by forward hooks over a network in evaluation", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> Results:
    for name, module in m.named_modules():
        if type(module) in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU):
            module.register_forward_hook(lambda module, args, y, name=name: draw.see(name, y))
    with torch.no_grad():
        m.eval()(draw.x())
    return {}


@use("an exception in a hook", (*BLOCKS, STEM), refused=(KeyError,))
def _(m: nn.Module, draw: Draw) -> Results:
    def fail(module: nn.Module, args: Any, y: Tensor) -> None:
        raise KeyError("stop")

    m.bn1.register_forward_hook(fail)
    return observe(m, draw)


@TABLE.every()
def test_a_hooked_module_does_what_the_plain_one_does(row, subject):
    check(row, subject)
