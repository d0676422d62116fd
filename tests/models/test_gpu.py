"""Networks on a GPU: no further from float64 than plain PyTorch is, in every precision and layout, however they run."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import resnet18

import fastres
from fastres import models
from fastres.train import DivergedError, TrainConfig, train
from tests.oracle import LAYOUTS
from tests.parity import scramble

pytestmark = pytest.mark.gpu

CLASSES = 10
NETWORKS = ("resnet18", "resnet50", "article", "resnet20", "wrn16-4", "fast")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A ReLU whose input is 0 up to rounding may flip on one side alone, and a single one moves the gradients by up to a
# thousandth. A wrong term moves them by more than a hundredth, and the operators' own tests measure in roundings.
FACTOR, FLIPPED = 8.0, 2e-3


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No tf32, for PyTorch's own convolutions either."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [b.allow_tf32 for b in backends]
    torch._dynamo.reset()
    for b in backends:
        b.allow_tf32 = False
    yield
    for b, allowed in zip(backends, before, strict=True):
        b.allow_tf32 = allowed


def images(layout: str = "channels_last", size: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 3, size, size, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    return x, torch.randint(CLASSES, (16,), device="cuda")


def step(
    model: nn.Module, x: Tensor, labels: Tensor, precision: str, run: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Loss, gradients and buffers of a training step, and what the network says in evaluation after it."""
    low, run = PRECISIONS[precision], model if run is None else run
    # Gradients of float16 vanish without a scale.
    scale = 1024.0 if low == torch.float16 else 1.0
    with torch.autocast("cuda", low, enabled=low is not None):
        loss = F.cross_entropy(run(x), labels)
    torch.autograd.backward(loss * scale)
    found = {"loss": loss.detach()[None]}
    found |= {f"gradient of {n}": p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    found |= {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", low, enabled=low is not None):
        found["evaluation"] = run(x)
    model.train()
    return found


def distance(found: dict[str, Tensor], exact: dict[str, Tensor], prefix: str) -> float:
    """Of all tensors with that prefix together, relative."""
    names = [n for n in exact if n.startswith(prefix)]
    assert names and found.keys() == exact.keys()
    difference = torch.stack([(found[n].double() - exact[n]).square().sum() for n in names]).sum()
    size = torch.stack([exact[n].square().sum() for n in names]).sum()
    return float((difference / size).sqrt())


def check(ours: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], precision: str) -> None:
    eps = torch.finfo(PRECISIONS[precision] or torch.float32).eps
    for prefix in ("loss", "gradient", "evaluation", ""):
        of_ours, of_plain = (distance(found, exact, prefix) for found in (ours, plain))
        allowed = FACTOR * of_plain + 4 * eps + FLIPPED * (prefix in ("gradient", ""))
        assert of_ours <= allowed, f"{prefix or 'everything'}: {of_ours:.2e}, eager {of_plain:.2e}"


def twins(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A fused network, the same in plain PyTorch, and that in float64."""
    ours, plain = (models.create(name, num_classes=CLASSES, dropout=0.0, fused=fused) for fused in (True, False))
    scramble(plain)
    ours.load_state_dict(plain.state_dict())
    return ours.cuda(), plain.cuda(), copy.deepcopy(plain).double()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_as_exact_as_plain_pytorchs(name: str, layout: str, precision: str) -> None:
    torch.manual_seed(0)
    ours, plain, exact = twins(name)
    x, labels = images(layout)
    for model in (ours, plain):
        model.to(memory_format=LAYOUTS[layout])
    expected = step(exact, x.double(), labels, "float32")
    check(step(ours, x, labels, precision), step(plain, x, labels, precision), expected, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "make", [lambda: resnet18(num_classes=CLASSES), lambda: twins("resnet20")[1]], ids=["torchvision", "resnet20"]
)
def test_the_compiler_backend_is_as_exact_as_plain_pytorch(make: Callable[[], nn.Module], precision: str) -> None:
    torch.manual_seed(0)
    plain = scramble(make()).cuda().to(memory_format=torch.channels_last)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    x, labels = images(size=64)
    expected = step(exact, x.double(), labels, "float32")
    fastres.compile_report(clear=True)
    run = fastres.compile(ours)
    check(step(ours, x, labels, precision, run), step(plain, x, labels, precision), expected, precision)
    assert any(row.fused_norms for row in fastres.compile_report()), "nothing was fused"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fuse_and_freeze_take_a_network_of_torchvision(precision: str) -> None:
    torch.manual_seed(0)
    plain = scramble(resnet18(num_classes=CLASSES)).cuda().to(memory_format=torch.channels_last)
    ours, exact = fastres.fuse(plain), copy.deepcopy(plain).double()
    x, labels = images(size=64)
    expected = step(exact, x.double(), labels, "float32")
    check(step(ours, x, labels, precision), step(plain, x, labels, precision), expected, precision)
    frozen, low = fastres.freeze(ours.eval()), PRECISIONS[precision]
    with torch.no_grad(), torch.autocast("cuda", low, enabled=low is not None):
        said = {"y": frozen(x)}
        expected = {"y": plain.eval()(x).double()}
    assert distance(said, expected, "y") <= 64 * torch.finfo(low or torch.float32).eps


def test_dropout_of_a_network_is_drawn_anew_each_step_and_follows_the_seed() -> None:
    model = models.create("resnet18", num_classes=CLASSES, dropout=0.3).cuda()
    x, _ = images("nchw")
    torch.manual_seed(1)
    first, second = model(x), model(x)
    torch.manual_seed(1)
    assert torch.equal(first, model(x)) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("amp", "more"),
    [
        ("none", ()),
        ("bf16", ()),
        ("fp16", ()),
        ("bf16", ("--compile", "--compile-mode", "reduce-overhead")),
        ("fp16", ("--compile", "--compile-mode", "reduce-overhead", "--clip-grad", "5", "--ema-decay", "0.9")),
    ],
)
def test_the_trainer_learns_digits(amp: str, more: tuple[str, ...], tmp_path: Path) -> None:
    options = {"dataset": "digits", "model": "resnet20", "epochs": "4", "device": "cuda", "amp": amp}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "fastres.train", "--fused", *words, *more, "--output-dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["best_accuracy"] > 0.8, best["best_accuracy"]


def test_a_loss_that_is_not_finite_is_traced_to_its_layer(tmp_path: Path) -> None:
    config = TrainConfig(
        model="resnet20", dataset="digits", device="cuda", lr=1e30, epochs=3, warmup_epochs=0.0, output_dir=tmp_path
    )
    with pytest.raises(DivergedError, match=r"at step \d+ .* is the first"):
        train(config)
