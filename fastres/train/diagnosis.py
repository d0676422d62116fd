"""Where a loss that is not finite comes from: the step computed once more, with a look at every tensor on the way."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastres.train.distributed import SINGLE, Group


@dataclass(frozen=True)
class Diagnosis:
    """The first place at which a step is not finite."""

    # "input", "loss", the name of a parameter, a buffer or a module ("" for the network itself), or "nowhere"
    where: str
    what: str  # a sentence without a full stop


def diagnose(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    group: Group = SINGLE,
) -> Diagnosis:
    """Find what made a loss NaN or infinite: the input, a parameter, the first module in order of execution, or a
    gradient.

    The network is left as it was: mode, weights, gradients, buffers and the generators of torch. Hooks make fused
    blocks run child by child, and dropout draws anew, so that what shows once may not show again; the sentence says so.

    Args:
        model: with the weights of the step, in the mode of the step.
        x: [N, C, H, W], the batch as the network got it.
        labels: [N], as `loss_of` takes them.
        loss_of: scalar loss of what the network returns, and the labels. Call within the step's autocast.
        group: the processes of the job, all of which call this, each with its share of the batch. They agree after each
            look, and all return the same, that of the lowest rank which found something: a network with synchronised
            or sharded parts communicates in both passes, so all must get to each or none.
    """
    found = _agreed([Diagnosis("input", f"the input holds {_odd(x)}")] if not _finite(x) else [], group)
    found = found or _agreed(_broken(model.named_parameters(), "the step before"), group)
    if found is not None:
        return found
    with _untouched(model, x.device), torch.enable_grad():
        # What normalises by batch statistics does not read its running ones, and the failed step may have spoilt them.
        return _agreed(_broken(_buffers_read(model), "a step before"), group) or _pass(model, x, labels, loss_of, group)


def _agreed(found: list[Diagnosis], group: Group) -> Diagnosis | None:
    """The first of what this process has found or, in a job, of what the lowest rank has that found something."""
    mine = found[0] if found else None
    for rank, one in enumerate(group.gather(mine)):
        if one is not None:
            return one if group.size == 1 else replace(one, what=f"{one.what} (rank {rank} of {group.size} processes)")
    return None


def _broken(tensors: Iterable[tuple[str, Tensor]], when: str) -> list[Diagnosis]:
    """A parameter or buffer that is not finite."""
    for name, tensor in tensors:
        if not _finite(tensor):
            return [Diagnosis(name, f"{name} holds {_odd(tensor)}: {when} overflowed")]
    return []


def _pass(
    model: nn.Module, x: Tensor, labels: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor], group: Group
) -> Diagnosis:
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
        module.register_forward_hook(forward_hook(name), with_kwargs=True) for name, module in _modules(model, x.device)
    ]
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in parameters:
        hook = gradient_hook(name, f"the gradient of {name}")
        hooks.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
    # Sharded parameters are not those of the graph, and backward reaches all of it on its way to the input.
    x = x.detach().requires_grad_()
    try:
        logits = model(x)
        first = _agreed(found, group)
        if first is not None:
            return first
        loss = loss_of(logits, labels)
        if not _finite(loss):
            what = (
                f"the loss is {_odd(loss)}, computed from finite outputs up to {_largest(list(_tensors(logits))):.2g}"
            )
            found.append(Diagnosis("loss", what))
        first = _agreed(found, group)
        if first is not None:
            return first
        if loss.requires_grad:
            torch.autograd.grad(loss, [x, *(parameter for _, parameter in parameters)], allow_unused=True)
        first = _agreed(found, group)
        if first is not None:
            return first
    finally:
        for handle in hooks:
            handle.remove()
    what = f"computed again, child by child, everything is finite, with a loss of {loss.item():.4g}"
    return _agreed([Diagnosis("nowhere", what)], group) or Diagnosis("nowhere", what)


def _modules(model: nn.Module, device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """The modules to look at: all that can run by themselves.

    On a CPU torch's nn.SyncBatchNorm cannot, so a fused block that holds some is looked at as a whole.
    """
    whole: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{block}.") for block in whole):
            continue
        if device.type == "cpu" and any(isinstance(child, nn.SyncBatchNorm) for child in module.children()):
            whole.append(name)
        yield name, module


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
    tensor = _local(tensor)
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor, so that looking at it communicates nothing; others as they are."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _odd(tensor: Tensor) -> str:
    return "NaN" if bool(torch.isnan(_local(tensor)).any()) else "infinity"


def _largest(tensors: list[Tensor]) -> float:
    return max((tensor.detach().abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)


def _title(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else f"the network ({type(module).__name__})"
