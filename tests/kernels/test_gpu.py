"""What only a GPU can show: streams, CUDA graphs, several devices, memory, tensors beyond 2^31 elements, autotuning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastres import FusedResNet18, _extension, contract, functional, reference
from fastres.functional import batch_norm_act
from fastres.kernels import tape

pytestmark = pytest.mark.gpu

STAGES = [(512, 64, 32, 32), (512, 128, 16, 16), (512, 256, 8, 8), (512, 512, 4, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype, memory_format=torch.channels_last, device="cuda") -> list[Tensor]:
    """x, r, weight, bias (leaves), running mean and variance."""
    x, r = (torch.randn(shape, device=device).mul_(2).add_(0.5) for _ in range(2))
    x, r = (t.to(dtype).contiguous(memory_format=memory_format).requires_grad_() for t in (x, r))
    c = shape[1]
    weight = (torch.rand(c, device=device) + 0.5).requires_grad_()
    bias = torch.randn(c, device=device).requires_grad_()
    return [x, r, weight, bias, torch.zeros(c, device=device), torch.ones(c, device=device)]


def step(tensors: list[Tensor], dy: Tensor, seed: Tensor | None, dropout_p: float = 0.1) -> list[Tensor]:
    x, r, weight, bias, mean, var = tensors
    y = batch_norm_act(x, mean, var, weight, bias, training=True, residual=r, dropout_p=dropout_p, seed=seed)
    return [y, *torch.autograd.grad(y, (x, r, weight, bias), dy), mean.clone(), var.clone()]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_model_shapes_agree_with_float64(shape, dtype, memory_format):
    torch.manual_seed(1)
    tensors = make(shape, dtype, memory_format)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    seed = torch.tensor([11], device="cuda")
    x, r, weight, bias, mean, var = exact
    with torch.no_grad():
        z = reference.batch_norm_act(x, None, None, weight, bias, training=True, residual=r, relu=False)
    dy = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format)
    # Too close to the kink to tell the sign in float32: such an element says nothing.
    dy = torch.where(z.abs() < 1e-4, torch.zeros((), dtype=dtype, device="cuda"), dy)
    y = reference.batch_norm_act(x, mean, var, weight, bias, training=True, residual=r, dropout_p=0.1, seed=seed)
    expected = [y, *torch.autograd.grad(y, (x, r, weight, bias), dy.double()), mean, var]
    actual = step(tensors, dy, seed)
    length = shape[0] * shape[2] * shape[3]
    for name, a, e in zip(("y", "dx", "dr", "dweight", "dbias", "mean", "var"), actual, expected, strict=True):
        eps = torch.finfo(a.dtype).eps
        allowed = 0.5 * eps * e.abs() + 8 * 2**-23 * (length**0.5 if a.dim() == 1 else 1) * max(1, e.abs().max().item())
        assert bool(((a.double() - e).abs() <= allowed).all()), name
    assert actual[0].stride() == tensors[0].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_bits_in_every_run(dtype):
    tensors = make(STAGES[1], dtype)
    dy, seed = torch.randn_like(tensors[0]), torch.tensor([5], device="cuda")
    start = [t.clone() for t in tensors[4:]]
    first = step(tensors, dy, seed)
    for _ in range(20):
        for t, s in zip(tensors[4:], start, strict=True):
            t.copy_(s)
        assert all(torch.equal(a, b) for a, b in zip(first, step(tensors, dy, seed), strict=True))


def test_a_repeated_call_does_not_reach_python(monkeypatch):
    if _extension.load_launch() is None:
        pytest.skip(f"launches go by Python: {_extension.status().launch.reason}")
    seed = torch.tensor([5], device="cuda")

    def drawn() -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(3)
        tensors = make((8, 24, 10, 6), torch.bfloat16)
        return tensors, torch.randn_like(tensors[0])

    first = step(*drawn(), seed)
    monkeypatch.setattr(tape, "teach", lambda *_: pytest.fail("a call like one before came to Python"))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(*drawn(), seed), strict=True))
        with torch.inference_mode():
            x, r, weight, bias, mean, var = drawn()[0]
            batch_norm_act(
                x.detach().clone(), mean, var, weight, bias, training=True, residual=r, dropout_p=0.1, seed=seed
            )
    with pytest.raises(pytest.fail.Exception):
        step(make((8, 24, 10, 7), torch.bfloat16), torch.randn(8, 24, 10, 7, device="cuda"), seed)


def test_two_streams_do_not_disturb_each_other():
    cases = [make(STAGES[2], torch.bfloat16) for _ in range(2)]
    dys = [torch.randn_like(c[0]) for c in cases]
    seed = torch.tensor([5], device="cuda")
    starts = [[t.clone() for t in c[4:]] for c in cases]
    alone = [step(c, dy, seed) for c, dy in zip(cases, dys, strict=True)]
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(50):
        for case, start in zip(cases, starts, strict=True):
            for t, s in zip(case[4:], start, strict=True):
                t.copy_(s)
        torch.cuda.synchronize()
        together = []
        for stream, case, dy in zip(streams, cases, dys, strict=True):
            with torch.cuda.stream(stream):
                together.append(step(case, dy, seed))
        torch.cuda.synchronize()
        for a, b in zip(alone, together, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_cuda_graph_replays_with_fresh_masks():
    tensors = make((64, 64, 16, 16), torch.bfloat16)
    dy = torch.randn_like(tensors[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(tensors, dy, None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors, dy, None)
    masks, before = [], tensors[4].clone()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        masks.append(captured[0] != 0)
        # Gradients of elements that were dropped in this replay are 0 in this replay.
        assert not captured[2][captured[0] == 0].any()
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert not torch.equal(before, tensors[4]), "the running statistics move with every replay"


def test_graphs_captured_on_one_stream_may_be_replayed_side_by_side():
    cases = [make(STAGES[2], torch.bfloat16) for _ in range(2)]
    dys = [torch.randn_like(c[0]) for c in cases]
    seed = torch.tensor([5], device="cuda")
    graphs, outputs, expected = [], [], []
    for case, dy in zip(cases, dys, strict=True):
        # Without its graph: what accumulates the leaves' gradients belongs to the stream that it was first used on.
        expected.append([t.detach() for t in step(case, dy, seed)[:5]])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(step(case, dy, seed)[:5])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(expected, outputs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none")
def test_the_second_gpu_computes_what_the_first_does():
    torch.cuda.set_device(0)
    tensors = make(STAGES[3], torch.float32)
    dy, seed = torch.randn_like(tensors[0]), torch.tensor([5], device="cuda")
    there = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in tensors]
    first = step(tensors, dy, seed)
    second = step(there, dy.to("cuda:1"), seed.to("cuda:1"))
    assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_nothing_is_kept_or_made_beyond_x_y_bits_and_gradients(dropout_p):
    tensors = make(STAGES[0], torch.bfloat16)
    x = tensors[0]
    dy = torch.randn_like(x)
    one = x.numel() * x.element_size()
    step(tensors, dy, None, dropout_p)  # what is made once: kernels, counters
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = batch_norm_act(x, *tensors[4:], *tensors[2:4], training=True, residual=tensors[1], dropout_p=dropout_p)
    assert torch.cuda.memory_allocated() - before <= one + x.numel() // 8 + 2**20, "y and bits"
    torch.autograd.grad(y, tensors[:4], dy)
    assert torch.cuda.max_memory_allocated() - before <= 3 * one + x.numel() // 8 + 4 * 2**20, "y, bits, dx, dr"


def test_a_tensor_beyond_2_to_the_31_elements():
    shape = (2**31 // (64 * 1024) + 3, 64, 32, 32)
    if torch.cuda.mem_get_info()[0] < 8 * shape[0] * 64 * 1024 * 2:
        pytest.skip("too little memory")
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    seed = torch.tensor([3], device="cuda")
    y = batch_norm_act(x, None, None, weight, bias, training=True, dropout_p=0.5, seed=seed)
    mean = torch.stack([p.float().mean((0, 2, 3)) for p in x.split(256)]).mean(0)  # the parts differ by rounding only
    tail = slice(shape[0] - 2, shape[0])
    z = (x[tail].float() - mean[:, None, None]) * (1 / (1 + 1e-5) ** 0.5)
    start = (shape[0] - 2) * 64 * 1024
    words = contract.philox_4x32(seed, torch.arange(start // 4, (start + 2 * 64 * 1024) // 4, device="cuda"))
    keep = (words.reshape(-1) >= contract.dropout_threshold(0.5)).view(2, 32, 32, 64).permute(0, 3, 1, 2)
    expected = torch.where(keep & (z > 0), 2 * z, 0)
    sure = z.abs() > 0.02
    assert ((y[tail].float() - expected).abs()[sure] <= 0.02 * expected.abs()[sure] + 0.01).all()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_network_trains_as_the_plain_one_does(mode):
    torch.manual_seed(0)
    model = FusedResNet18(num_classes=10).cuda().to(memory_format=torch.channels_last)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(32, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (32,), device="cuda")
    losses = []
    for run in (model, torch.compile(model, fullgraph=True, mode=None if mode == "default" else mode)):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        seen = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(run(images), labels)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(seen)
    assert all(abs(a - b) <= 2e-2 * abs(a) for a, b in zip(*losses, strict=True)), losses
    assert losses[0][-1] < losses[0][0]


def test_autotuning_leaves_results_and_running_statistics_alone(tmp_path):
    """In a process each, as the environment decides; tuned sums may round otherwise, the statistics move once."""
    program = """
import torch
from tests.kernels.test_gpu import make, step
torch.manual_seed(0)
tensors = make((64, 64, 16, 16), torch.float32)
torch.save(step(tensors, torch.randn_like(tensors[0]), torch.tensor([5], device="cuda")), {path!r})
"""
    results = []
    for tuned in ("0", "1"):
        path = str(tmp_path / tuned)
        environment = os.environ | {"FASTRES_AUTOTUNE": tuned, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
        subprocess.run(
            [sys.executable, "-c", program.format(path=path)], env=environment, check=True,
            cwd=Path(__file__).parents[2], timeout=300,
        )  # fmt: skip
        results.append(torch.load(path))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_float64_and_old_gpus_have_plain_pytorch_behind_the_operators():
    x = torch.randn(2, 8, 4, 4, device="cuda", dtype=torch.float64)
    with pytest.raises(TypeError, match="float64 is served on the CPU only"):
        functional.batch_norm_act(x, None, None, training=True)
    _, mean, _ = torch.ops.fastres.batch_norm_act_stats(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
