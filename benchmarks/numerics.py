"""`python -m benchmarks.numerics`: rounding errors against float64, by operator, algorithm, shape and dtype.

An error is the largest one of all elements over the largest value, in the output and in two gradients: the input's and
the weight's (of the convolution, or where there is none of the normalisation). Of a network's gradients it is the norm
of the difference over the norm, all weights together. Inputs are random and are rounded to the dtype before any side
sees them. Torch's side is the same in torch's operators, one by one in that dtype. Figures are the largest of several
draws.

SiLU follows a normalisation, since at ReLU's kink a sign that flips would be the whole error of a gradient.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import fastres
from benchmarks.machine import describe_machine
from benchmarks.records import PUBLISHED, ROOT, insert_table, row, slug, to_json, write_text
from fastres.activations import Activation
from fastres.functional import (
    NormParams,
    batch_norm_act,
    conv3x3,
    conv3x3_norm_act,
    norm_act_conv3x3,
    projection_shortcut,
)
from fastres.ops import conv3x3 as ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTITIES = ("output", "input gradient", "weight gradient")
STAGES = ((64, 32), (128, 16), (256, 8), (512, 4))
SILU = Activation("silu")


@dataclass(frozen=True)
class Config:
    """Write errors against float64 as JSON and as a table."""

    batch: int = 8
    """Images a batch, but for "gemm", which serves few."""
    draws: int = 2
    """Random inputs of every case."""
    seed: int = 0
    """Of the first draw."""
    output_dir: Path = PUBLISHED
    """Folder for the raw figures."""
    page: Path | None = ROOT / "docs" / "numerics.md"
    """Markdown file that takes the tables of all raw figures in the folder, between `<!-- numerics -->` and
    `<!-- /numerics -->`."""
    compute: bool = True
    """Off: write the page anew from the folder."""


class Case(NamedTuple):
    """One computation, in our operators and in torch's.

    Attributes:
        shapes: of x, of the weight, and of what else both functions take; vectors are parameters of a normalisation,
            and float32 in every dtype (float64 in the oracle).
        offset: added to x.
    """

    operator: str
    algorithm: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    gradients: bool = True
    offset: float = 0.0

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shapes[0]))
        return f"{shape}, mean {self.offset:g}" if self.offset else shape


@dataclass(frozen=True)
class Errors:
    """The errors of a case: quantity -> figure, for each side; a network has one quantity."""

    operator: str
    algorithm: str
    dtype: str
    shape: str
    fastres: dict[str, float]
    torch: dict[str, float]


def normalised(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Torch's batch normalisation in training, and SiLU."""
    return F.silu(F.batch_norm(x, None, None, gamma, beta, training=True))


def cases(batch: int) -> Iterator[Case]:
    """Every operator with a kernel of its own, on the shapes of a ResNet-18's stages."""

    def end_of_block(x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
        return batch_norm_act(x, None, None, gamma, beta, training=True, residual=residual, activation=SILU)

    def end_by_torch(x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
        return F.silu(F.batch_norm(x, None, None, gamma, beta, training=True) + residual)

    def projected(s: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        norm = NormParams(None, None, gamma, beta)
        return projection_shortcut(s, weight, norm, stride=2, training=True, activation=SILU)

    for c, size in (STAGES[0], STAGES[-1]):
        x = (batch, c, size, size)
        for dtype in DTYPES:
            yield Case("batch_norm_act", "", dtype, (x, (c,), (c,), x), end_of_block, end_by_torch)
        yield Case("batch_norm_act", "", torch.float32, (x, (c,), (c,), x), end_of_block, end_by_torch, offset=1000.0)
        for dtype in DTYPES:
            shapes = (x, (2 * c, c, 1, 1), (2 * c,), (2 * c,))
            yield Case(
                "projection_shortcut", "", dtype, shapes, projected,
                lambda s, w, gamma, beta: normalised(F.conv2d(s, w, stride=2), gamma, beta),
            )  # fmt: skip
    for c, size in STAGES:
        yield from convolutions((batch, c, size, size))
    yield from inference((batch, 64, 32, 32), "winograd")
    yield from inference((batch, 512, 4, 4), "winograd")
    yield from inference((1, 256, 8, 8), "gemm")
    yield from inference((1, 512, 4, 4), "gemm")


def convolutions(x: tuple[int, int, int, int]) -> Iterator[Case]:
    """The 3x3 convolutions of a training step, by Winograd's algorithm."""

    def after(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        norm = NormParams(None, None, gamma, beta)
        return norm_act_conv3x3(x, norm, weight, activation=SILU, algorithm="winograd")[0]

    c = x[1]
    for dtype in DTYPES[:2]:
        yield Case(
            "conv3x3", "winograd", dtype, (x, (c, c, 3, 3)),
            lambda x, w: conv3x3(x, w, algorithm="winograd"), lambda x, w: F.conv2d(x, w, padding=1),
        )  # fmt: skip
        yield Case(
            "norm_act_conv3x3", "winograd", dtype, (x, (c, c, 3, 3), (c,), (c,)), after,
            lambda x, w, gamma, beta: F.conv2d(normalised(x, gamma, beta), w, padding=1),
        )  # fmt: skip


def inference(x: tuple[int, int, int, int], algorithm: str) -> Iterator[Case]:
    """A convolution with the normalisation and activation behind it, in evaluation."""

    def ours(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        norm = NormParams(torch.zeros_like(beta), torch.ones_like(gamma), gamma, beta)
        if algorithm == "gemm":  # which the function takes where it pays, and not on demand
            return ops.inference(x, weight, norm, None, SILU, 1, algorithm)  # type: ignore[no-any-return]
        return conv3x3_norm_act(x, weight, norm, activation=SILU, algorithm=algorithm)

    def torchs(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.silu(
            F.batch_norm(F.conv2d(x, weight, padding=1), torch.zeros_like(beta), torch.ones_like(gamma), gamma, beta)
        )

    c = x[1]
    for dtype in DTYPES[:1] if algorithm == "gemm" else DTYPES[:2]:
        yield Case("conv3x3_norm_act", algorithm, dtype, (x, (c, c, 3, 3), (c,), (c,)), ours, torchs, gradients=False)


def tensors(case: Case, generator: torch.Generator) -> list[Tensor]:
    """The case's inputs in float64, each a value of its dtype."""
    made = []
    for index, shape in enumerate(case.shapes):
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            t = (1 + 0.2 * t).float().double()
        else:
            t = t * math.prod(shape[1:]) ** -0.5 if index == 1 else t
            t = (t + case.offset if index == 0 else t).to(case.dtype).double()
            t = t.contiguous(memory_format=torch.channels_last)
        made.append(t)
    return made


def computed(f: Callable[..., Tensor], given: Sequence[Tensor], dy: Tensor, gradients: bool) -> list[Tensor]:
    """The output, and the gradients of the first two inputs where they are asked for."""
    leaves = [t.detach().clone().requires_grad_(gradients) for t in given]
    with torch.set_grad_enabled(gradients):
        y = f(*leaves)
        return [y, *torch.autograd.grad(y, leaves[:2], dy.to(y.dtype))] if gradients else [y]


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest error over the largest value."""
    return float((actual.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


def measure(case: Case, draws: int, seed: int) -> Errors:
    """The largest errors of some draws."""
    worst = {"ours": [0.0] * 3, "torchs": [0.0] * 3}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(seed + draw)
        exact = tensors(case, generator)
        rounded = [t.float() if t.dim() == 1 else t.to(case.dtype) for t in exact]
        dy = torch.randn(case.torchs(*exact).shape, generator=generator, dtype=torch.float64).to(case.dtype).double()
        expected = computed(case.torchs, exact, dy, case.gradients)
        for side in worst:
            found = computed(getattr(case, side), rounded, dy, case.gradients)
            figures = map(relative, found, expected)
            worst[side] = [max(a, b) for a, b in zip(worst[side], figures, strict=False)]
    ours, torchs = (dict(zip(QUANTITIES, figures, strict=False)) for figures in worst.values())
    return Errors(case.operator, case.algorithm, str(case.dtype).removeprefix("torch."), case.name, ours, torchs)


# ------------------------------------------------------------------------------------------------------------ networks


def networks(batch: int, draws: int, seed: int) -> Iterator[Errors]:
    """A ResNet-18 of SiLUs on images of 32 pixels: logits, frozen and not, and the gradients of a training step."""
    for dtype in DTYPES[:2]:
        worst: dict[str, list[float]] = {}
        for draw in range(draws):
            torch.manual_seed(seed + draw)
            for name, figures in network_errors(batch, dtype).items():
                worst[name] = [max(pair) for pair in zip(worst.get(name, [0.0, 0.0]), figures, strict=True)]
        kind = "float32" if dtype == torch.float32 else "bfloat16 autocast"
        for name, (ours, torchs) in worst.items():
            yield Errors(f"ResNet-18, {name}", "", kind, f"{batch}x3x32x32", {name: ours}, {name: torchs})


def network_errors(batch: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Quantity -> errors of fastres and of torch, for one draw."""
    model = fastres.FusedResNet18(num_classes=10).to(memory_format=torch.channels_last)
    for module in model.modules():
        if hasattr(module, "relu"):
            module.relu = nn.SiLU()
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    images = images.contiguous(memory_format=torch.channels_last)
    plain = fastres.unfuse(copy.deepcopy(model))
    exact = copy.deepcopy(plain).double()

    def gradients(network: nn.Module) -> Tensor:
        network.train()
        wide = next(network.parameters()).dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16 and not wide):
            logits = network(images.double() if wide else images)
        F.cross_entropy(logits.double(), labels).backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.double().flatten() for p in network.parameters() if p.grad is not None])

    def logits(network: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found: Tensor = network.eval()(images)
        return found

    expected, ours, torchs = map(gradients, (exact, model, plain))
    step = [float((g - expected).norm() / expected.norm()) for g in (ours, torchs)]
    # The running statistics have seen one batch; from here on they are the oracle's.
    for network in (model, plain):
        network.load_state_dict(exact.state_dict())
    exact.load_state_dict(plain.state_dict())
    with torch.no_grad():
        right = exact.eval()(images.double())
    by_torch = relative(logits(plain), right)
    return {
        "gradients of a training step": (step[0], step[1]),
        "logits": (relative(logits(model), right), by_torch),
        "logits, frozen": (relative(logits(fastres.freeze(model)), right), by_torch),
    }


# ----------------------------------------------------------------------------------------------------------- reporting


def table(machine: dict[str, Any], found: Sequence[Errors]) -> str:
    """Where and how it was computed; a table of the operators, and one of the networks."""
    operators = [e for e in found if len(e.fastres) > 1 or QUANTITIES[0] in e.fastres]
    heads = [f"{quantity}: {side}" for quantity in QUANTITIES for side in ("fastres", "torch")]
    lines = [
        f"{machine['processor']}, {machine['capability']}, {machine['threads']} threads; torch {machine['torch']}; "
        f"{machine['date']}. The largest of {machine['draws']} draws.",
        "",
        row("operator", "algorithm", "x", "dtype", *heads),
        row(*["---"] * 4, *["---:"] * len(heads)),
    ]
    for e in operators:
        figures = [side.get(quantity) for quantity in QUANTITIES for side in (e.fastres, e.torch)]
        lines.append(row(f"`{e.operator}`", e.algorithm, e.shape, e.dtype, *map(shown, figures)))
    lines += ["", row("network", "images", "dtype", "fastres", "torch"), row(*["---"] * 3, *["---:"] * 2)]
    for e in found:
        if e not in operators:
            figures = [*e.fastres.values(), *e.torch.values()]
            lines.append(row(e.operator, e.shape, e.dtype, *map(shown, figures)))
    return "\n".join(lines) + "\n"


def shown(error: float | None) -> str:
    """Two digits; nothing where there is none."""
    return "" if error is None else f"{error:.1e}"


def from_json(file: Path) -> tuple[dict[str, Any], list[Errors]]:
    """The machine and the errors of a run.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return data["machine"], [Errors(**entry) for entry in data["errors"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"output_dir: {file} does not hold errors of this script ({error})") from error


def page(folder: Path) -> str:
    """The tables of all runs in a folder."""
    return "\n".join(table(*from_json(file)) for file in sorted(folder.glob("numerics-*.json")))


def main(config: Config) -> None:
    """Compute, print, write."""
    if config.compute:
        machine = describe_machine() | {"draws": config.draws, "seed": config.seed}
        found = [measure(case, config.draws, config.seed) for case in tqdm(list(cases(config.batch)))]
        found += networks(config.batch, config.draws, config.seed)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        name = f"numerics-{slug(machine['processor'])}-{slug(machine['capability'])}.json"
        entries = [dataclasses.asdict(e) for e in found]
        write_text(config.output_dir / name, to_json({"machine": machine, "errors": entries}))
        print(table(machine, found))
    if config.page is not None:
        insert_table(config.page, page(config.output_dir), "numerics")


if __name__ == "__main__":
    main(tyro.cli(Config))
