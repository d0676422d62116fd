"""Where a loss that is not finite comes from: the step computed once more, with a look at every tensor on the way."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Diagnosis:
    """The first place at which a step is not finite."""

    # "input", "loss", the name of a parameter, a buffer or a module ("" for the network itself), or "nowhere"
    where: str
    what: str  # a sentence without a full stop


def diagnose(model: nn.Module, x: Tensor, labels: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Diagnosis:
    """Find what made a loss NaN or infinite: the input, a parameter, the first module in order of execution, or a
    gradient.

    The network is left as it was: mode, weights, gradients, buffers and the generators of torch. Hooks make fused
    blocks run child by child, and dropout draws anew, so that what shows once may not show again; the sentence says so.

    Args:
        model: with the weights of the step, in the mode of the step.
        x: [N, C, H, W], the batch as the network got it.
        labels: [N], as `loss_of` takes them.
        loss_of: scalar loss of what the network returns, and the labels. Call within the step's autocast.
    """
    if not _finite(x):
        return Diagnosis("input", f"the input holds {_odd(x)}")
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return Diagnosis(name, f"{name} holds {_odd(parameter)}: the step before overflowed")
    with _untouched(model, x.device), torch.enable_grad():
        # What normalises by batch statistics does not read its running ones, and the failed step may have spoilt them.
        for name, buffer in _buffers_read(model):
            if not _finite(buffer):
                return Diagnosis(name, f"{name} holds {_odd(buffer)}: a step before overflowed")
        return _pass(model, x, labels, loss_of)


def _pass(model: nn.Module, x: Tensor, labels: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Diagnosis:
    """Forward and, where that is finite, backward, with hooks on every module."""
    found: list[Diagnosis] = []  # in order of execution
    largest = 0.0  # of all gradients that were finite

    def forward_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(output))
            if not all(map(_finite, outputs)):
                title = _title(name, module)
                if all(map(_finite, inputs)):
                    what = f"is the first whose output is not finite (its inputs are, up to {_largest(inputs):.2g})"
                else:
                    what = "is the first whose output is not finite, from inputs that no module before it returned"
                found.append(Diagnosis(name, f"{title} {what}"))
            elif not any(module.children()):
                for tensor in outputs:
                    if tensor.requires_grad:
                        tensor.register_hook(  # type: ignore[no-untyped-call]
                            gradient_hook(name, f"the gradient of the output of {_title(name, module)}")
                        )

        return hook

    def gradient_hook(name: str, title: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            nonlocal largest
            if _finite(gradient):
                largest = max(largest, _largest([gradient]))
            else:
                what = f"is the first that is not finite (those before it are, up to {largest:.2g})"
                found.append(Diagnosis(name, f"{title} {what}"))

        return hook

    hooks = [
        module.register_forward_hook(forward_hook(name), with_kwargs=True) for name, module in model.named_modules()
    ]
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in parameters:
        hook = gradient_hook(name, f"the gradient of {name}")
        hooks.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
    try:
        logits = model(x)
        if found:
            return found[0]
        loss = loss_of(logits, labels)
        if not _finite(loss):
            what = (
                f"the loss is {_odd(loss)}, computed from finite outputs up to {_largest(list(_tensors(logits))):.2g}"
            )
            return Diagnosis("loss", what)
        if parameters and loss.requires_grad:
            torch.autograd.grad(loss, [parameter for _, parameter in parameters], allow_unused=True)
        if found:
            return found[0]
    finally:
        for handle in hooks:
            handle.remove()
    return Diagnosis(
        "nowhere", f"computed again, child by child, everything is finite, with a loss of {loss.item():.4g}"
    )


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and torch's generators back to what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _buffers_read(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers on which the output depends in the present mode."""
    for prefix, module in model.named_modules():
        batch_statistics = module.training and isinstance(module, nn.modules.batchnorm._NormBase)
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if not (batch_statistics and name.rpartition(".")[2].startswith("running_")):
                yield name, buffer


def _tensors(values: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested containers."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _odd(tensor: Tensor) -> str:
    return "NaN" if bool(torch.isnan(tensor).any()) else "infinity"


def _largest(tensors: list[Tensor]) -> float:
    return max((tensor.detach().abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)


def _title(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else f"the network ({type(module).__name__})"
