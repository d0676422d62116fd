"""Normalisations over several processes equal one process on the joined batch, by the float64 oracle."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import Activation, contract, functional, reference
from tests import oracle
from tests.distributed.processes import run_processes
from tests.oracle import Case, assert_close

# ------------------------------------------------------------------------------------------------------- the function


class Messages(TorchDispatchMode):
    """The numbers that were sent, a message each."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


class Call(NamedTuple):
    """One call of batch_norm_act over processes, whose batches have these sizes."""

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    residual: str = "none"  # "plain", "normed"
    activation: str = "relu"
    order: str = "add_act"
    dropout: float = 0.0
    affine: bool = True
    running: bool = True
    mean: float = 0.5


CALLS = {
    2: [
        *[
            Call((4, 4), dtype, layout, residual)
            for dtype, (layout, residual) in itertools.product(
                oracle.DTYPES, [("nchw", "plain"), ("channels_last", "normed"), ("channels_last", "none")]
            )
        ],
        Call((3, 5), order="act_add", residual="plain", dropout=0.3),
        Call((3, 5), activation="silu", residual="normed"),
        Call((1, 6), activation="identity", affine=False, running=False, residual="normed"),
        Call((4, 4), mean=1e4),
    ],
    3: [
        Call((2, 0, 5), residual="normed"),
        Call((0, 3, 4), torch.float64, "nchw", residual="plain", dropout=0.2),
        Call((3, 1, 4), torch.bfloat16, residual="plain"),
    ],
}
SHAPE = (6, 5, 3)


class Noise(NamedTuple):
    """Errors that a far mean brings into the joined mean, the joined variance, xhat = rstd (x - mean) and y."""

    mean: float = 0.0
    var: float = 0.0
    xhat: float = 0.0
    y: float = 0.0


def rounded_means(call: Call, exact: Case) -> Noise:
    """What follows from the rounding of each process's mean, and of the joined one, to half an ulp: eps of the mean.

    The variance is that inside the processes and that of their means, sum of w (mean - joined mean)^2, which an error e
    of the means moves by at most 2 e max |mean - joined mean| + e^2. rstd moves by half as much as the variance, each
    by its own size.
    """
    if call.mean <= 1:
        return Noise()
    x, norm = exact.tensors["x"].detach(), exact.norms["norm"]
    mean = abs(call.mean) * torch.finfo(contract.statistics_dtype(call.dtype)).eps
    means = torch.stack([part.mean((0, 2, 3)) for part in x.split(call.sizes)])
    joined = x.mean((0, 2, 3))
    var = 2 * mean * float((means - joined).abs().max()) + mean**2
    rstd = (x.var((0, 2, 3), correction=0) + norm.eps).rsqrt()
    farthest = float((x - joined[:, None, None]).abs().max())
    xhat = float(rstd.max()) * (mean + farthest * float(rstd.max()) ** 2 * var / 2)
    return Noise(mean, var, xhat, xhat * float(norm.weight.detach().abs().max()))


def joined_case(call: Call) -> tuple[Case, Tensor, list[Tensor]]:
    """The case on the joined batch, dy, and each process's dropout seed."""
    gen = oracle.generator("synchronised", call)
    shape = (sum(call.sizes), *SHAPE)
    tensors = {"x": oracle.activation(shape, call.dtype, call.layout, gen, mean=call.mean, std=1.0).requires_grad_()}
    norms = {"norm": oracle.norm(SHAPE[0], call.dtype, gen, affine=call.affine, running=call.running)}
    if call.residual != "none":
        tensors["residual"] = oracle.activation(shape, call.dtype, call.layout, gen).requires_grad_()
    if call.residual == "normed":
        norms["residual_norm"] = oracle.norm(SHAPE[0], call.dtype, gen, affine=call.affine, running=call.running)
    dy = torch.randn(shape, generator=gen, dtype=torch.float64).to(call.dtype)
    if call.activation == "relu":
        z = on_joined(call, case := Case(tensors, norms).double(), None, activation="identity").detach()
        if call.order == "act_add":
            z = z - case.tensors["residual"]
        dy[oracle.near_zero(z, call.dtype) | (z.abs() <= rounded_means(call, case).y)] = 0
    return Case(tensors, norms), dy, [torch.tensor([17 + rank]) for rank in range(len(call.sizes))]


def arguments(case: Case) -> dict[str, Any]:
    norm = case.norms["norm"]
    return {
        "residual": case.tensors.get("residual"), "residual_norm": case.norms.get("residual_norm"),
        "momentum": norm.momentum, "eps": norm.eps, "training": True,
    }  # fmt: skip


def on_joined(call: Call, exact: Case, seeds: list[Tensor] | None, activation: str | None = None) -> Tensor:
    """The oracle in float64, with the dropout masks of all processes."""
    given = arguments(exact)
    residual = given.pop("residual") if call.order == "act_add" else None
    f = Activation(activation or call.activation)
    y = reference.batch_norm_act(exact.tensors["x"], *exact.norms["norm"][:4], activation=f, **given)
    if seeds is not None and call.dropout > 0:
        keep = [contract.dropout_keep((n, *SHAPE), s, call.dropout) for n, s in zip(call.sizes, seeds, strict=True)]
        y = torch.where(torch.cat(keep), y / (1 - call.dropout), 0)
    return y if residual is None else y + residual


def share(case: Case, call: Call, rank: int) -> Case:
    begin = sum(call.sizes[:rank])
    tensors = {
        name: t.detach()[begin : begin + call.sizes[rank]].contiguous(memory_format=oracle.LAYOUTS[call.layout])
        for name, t in case.tensors.items()
    }
    return Case({name: t.requires_grad_() for name, t in tensors.items()}, case.norms)


def function_on_rank(rank: int, calls: list[Call]) -> list[tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]]:
    found = []
    for call in calls:
        for _ in range(2):
            joined, dy, seeds = joined_case(call)
            case, begin = share(joined, call, rank), sum(call.sizes[:rank])
            with Messages() as sent:
                y = functional.batch_norm_act(
                    case.tensors["x"], *case.norms["norm"][:4], activation=call.activation, order=call.order,
                    dropout_p=call.dropout, seed=seeds[rank], group=dist.group.WORLD, **arguments(case),
                )  # fmt: skip
                inputs = case.inputs()
                gradients = torch.autograd.grad(y, list(inputs.values()), dy[begin : begin + call.sizes[rank]])
            vectors = 2 * SHAPE[0] * (2 if call.residual == "normed" else 1)
            assert sent.sizes == [2 + vectors, vectors], f"{call}: expected one message forward and one backward"
            found.append((y.detach(), dict(zip(inputs, gradients, strict=True)), case.running()))
        for first, second in zip(flat(found[-2]), flat(found[-1]), strict=True):
            assert torch.equal(first, second), f"{call}: another result in the second run"
        found.pop()
    return found


def flat(result: Any) -> list[Tensor]:
    y, gradients, running = result
    return [y, *gradients.values(), *running.values()]


@pytest.mark.parametrize("count", CALLS)
def test_processes_together_normalise_as_one_does_the_joined_batch(count):
    ranks = run_processes(function_on_rank, count, CALLS[count])
    for index, call in enumerate(CALLS[count]):
        case, dy, seeds = joined_case(call)
        exact = case.double()
        y = on_joined(call, exact, seeds)
        inputs, elements = exact.inputs(), sum(call.sizes) * SHAPE[1] * SHAPE[2]
        expected = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy.double()), strict=True))
        found = [rank[index] for rank in ranks]
        noise = rounded_means(call, exact)
        assert_close(torch.cat([f[0] for f in found]), y, f"{call}: y", noise=noise.y)
        for name, wanted in expected.items():
            parts = [f[1][name] for f in found]
            actual = torch.cat(parts) if name in case.tensors else torch.stack(parts).sum(0)
            # The sum of xhat weighted by g moves by sum g times as much.
            off = noise.xhat * float(expected["norm.bias"].abs().max()) if name == "norm.weight" else noise.y
            assert_close(actual, wanted, f"{call}: gradient of {name}", length=elements, noise=off)
        for name, wanted in exact.running().items():
            off = noise.mean if name.endswith("mean") else noise.var
            for rank in found:
                assert_close(rank[2][name], wanted, f"{call}: {name}", length=elements, noise=off)
                assert torch.equal(rank[2][name], found[0][2][name]), f"{call}: {name} differs between processes"
