"""The `fastres` operator library: defining an operator, and which implementation serves which device."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastres import _extension, _triton
from fastres.ops.arguments import Arguments
from fastres.ordinary import why_not_ordinary

_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor

_WRONG_DTYPE = re.compile(r"\w+: expected dtype ")

LIBRARY: Any = torch.library.Library("fastres", "DEF")  # type: ignore[no-untyped-call]


def define(
    name: str,
    fallback: Callable[..., Any],
    returns: str,
    *,
    fake: Callable[..., Any],
    function: str,
    mutates: Sequence[str] = (),
    compiled_for: tuple[str, ...] = ("cpu",),
    launcher: tuple[str, str] | None = None,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Define an operator and return a function that calls it, below autograd, with grouped arguments.

    The function has two attributes for those who look at operators: `overload` and `arguments`.

    Args:
        name: of the operator.
        fallback: its implementation in plain PyTorch, which serves every device that has no kernel of its own. Its
            parameters are the operator's (`fastres.ops.arguments`), and so are those of the other implementations.
        returns: the schema's results.
        fake: makes results of the right shapes, for tensors without data.
        function: the function of fastres.functional whose torch.autograd.Function is made of this operator. The
            operator itself has no derivative, and refuses inputs that require one, wherever a graph calls it alone.
        mutates: flat arguments that it updates.
        compiled_for: types of devices whose compiled kernels, in csrc/, are loaded (and built if need be) at the first
            call; the dispatcher goes to those directly from then on.
        launcher: (module of fastres.kernels, function) that serves CUDA tensors; a call like one before is repeated by
            the compiled module of csrc/launch.
        flops: the formula for torch.utils.flop_counter: of the arguments, tensors replaced by their shapes, and of
            out_shape. It gives what the counter finds for the same in PyTorch's operators.
    """
    arguments = Arguments(fallback, mutates)
    LIBRARY.define(f"{name}({arguments.schema}) -> {returns}")
    overload, qualified = getattr(torch.ops.fastres, name).default, f"fastres::{name}"
    loaders: dict[str, Callable[[], object]]
    loaders = {"cpu": _extension.load_cpu, "cuda": functools.partial(_load_cuda, qualified, function)}
    load = {device: loaders[device] for device in compiled_for}
    on_gpu: Callable[..., Any] = lambda *args: fallback(**arguments.group(*args))  # noqa: E731
    if launcher is not None:
        load["cuda"] = functools.partial(_load_launch, qualified, function)
        on_gpu = _triton.on_gpu(*launcher, fallback, arguments.group)

    def dispatch(*args: Any) -> Any:
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        if device in load and not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device.upper()):
            load[device]()
            if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device.upper()):
                return overload(*args)
        return on_gpu(*args) if device == "cuda" else fallback(**arguments.group(*args))

    def refuse_gradients(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"fastres::{name}: expected inputs that require no gradient, or torch.no_grad(), for the operator has "
                f"no derivative of its own; call fastres.functional.{function} where gradients are needed"
            )
        try:
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *args)
        except ValueError as e:
            raise _in_python(e) from None

    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    LIBRARY.impl(name, refuse_gradients, "Autograd", with_keyset=True)
    torch.library.register_fake(f"fastres::{name}", lambda *args: fake(**arguments.group(*args)), lib=LIBRARY)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.fastres, name))(
            lambda *args, out_shape, **_: flops(**arguments.group(*args), out_shape=out_shape)
        )
    # The guard holds for as long as it exists: a with statement would cost another 0.3 us a call.
    call: Any = arguments.caller(overload, torch._C._AutoDispatchBelowAutograd, torch.compiler.is_compiling, _in_python)
    call.overload, call.arguments = overload, arguments
    return call


def _load_cuda(qualified: str, function: str) -> None:
    if _extension.load_cuda() is not None:
        _guard_in_cpp(_extension.load_launch(), qualified, function)


def _load_launch(qualified: str, function: str) -> None:
    launches = _extension.load_launch()
    if launches is not None:
        launches.install(qualified, "CUDA")
        _guard_in_cpp(launches, qualified, function)


def _guard_in_cpp(launches: Any, qualified: str, function: str) -> None:
    """What `refuse_gradients` does, for CUDA tensors: on its way through Python it would cost more than a launch."""
    if launches is not None:
        launches.guard(qualified, "CUDA", function)


def _in_python(error: ValueError) -> Exception:
    """A kernel's refusal as users see it: that of a dtype is a TypeError.

    The compiled kernels know no Python, and exceptions of the C++ library become ValueError and RuntimeError alone.
    """
    return TypeError(*error.args) if _WRONG_DTYPE.match(str(error)) else error


def convolution_flops(output: Sequence[int], weight: Sequence[int], results: int = 1) -> int:
    """Of a convolution in one group, from the shapes of its output (or of that one's gradient) and of its weight.

    Args:
        results: how many are computed, of the output in forward and of the two gradients in backward; each takes every
            product of a weight and an output position once.
    """
    return 2 * results * math.prod(weight) * output[0] * math.prod(output[2:])


def restored(saved: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A saved tensor in the strides that it was saved in; hooks on saved tensors may bring it back in others."""
    if saved.stride() == strides:
        return saved
    # empty_like knows what to do about strides that leave gaps or overlap.
    like = torch.empty_strided(saved.shape, strides, dtype=saved.dtype, device="meta")
    return torch.empty_like(like, device=saved.device).copy_(saved)


def in_strides_of(weight: Tensor, gradient: Tensor) -> Tensor:
    """A weight's gradient in the weight's own strides, those of axes of size 1 included: DDP compares them all."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def needs_plain_formula(dy: Tensor, dy2: Tensor | None = None) -> bool:
    """Whether a backward has to be PyTorch's own operators, since it is to be differentiated again, or batched."""
    if torch.compiler.is_compiling():
        return False
    # torch.autograd.grad(is_grads_batched=True) has batches of its own, beside torch.func's.
    batched = _is_batched(dy) or (dy2 is not None and _is_batched(dy2))
    return torch.is_grad_enabled() or batched or why_not_ordinary() is not None
