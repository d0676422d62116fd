import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastres.nn import FusedBasicBlock
from fastres.train import TrainConfig, distributed, load_checkpoint, parallel, train
from fastres.train import __main__ as command
from fastres.train.distributed import SINGLE, Group, leave_group, lost_peer, rank_device, start_group
from fastres.train.errors import InputError, RunError
from tests.distributed.processes import run_processes
from tests.train.conftest import TinyNet, make_data, signal_in_call
from tests.train.job import TINY_DROPOUT

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def with_group(rank: int, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return work(start_group(CPU), *args)


def in_processes(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What work(group, *args) gives in each of `size` processes, by rank."""
    return run_processes(with_group, size, work, args)


# --- Group ---


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 60, 61])
def test_shares_are_those_of_tensor_split(size: int, count: int) -> None:
    things = torch.arange(count)
    for rank, part in enumerate(torch.tensor_split(things, size)):
        assert torch.equal(things[Group(rank, size).share(count)], part)


def test_one_process_needs_no_process_group() -> None:
    tensor = torch.ones(2)
    assert SINGLE.is_main
    assert SINGLE.any(True) and not SINGLE.any(False)
    assert SINGLE.sum(tensor) is tensor
    assert SINGLE.gather("a") == ["a"]
    assert SINGLE.broadcast("a") == "a"
    SINGLE.barrier()
    leave_group()
    assert not dist.is_initialized()


def talk(group: Group, port: int) -> dict[str, Any]:
    """In a group that is started as torchrun's processes start theirs."""
    group.barrier()
    dist.destroy_process_group()
    os.environ.update(
        RANK=str(group.rank), LOCAL_RANK=str(group.rank), WORLD_SIZE=str(group.size),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    group = start_group(CPU)
    tensor = torch.full((2,), group.rank + 1.0)
    return {
        "main": group.is_main,
        "again": start_group(CPU) == group,
        "any": [group.any(group.rank == 1), group.any(False)],
        "sum": group.sum(tensor).tolist(),
        "kept": tensor.tolist(),
        "gather": group.gather(f"from {group.rank}"),
        "broadcast": group.broadcast(f"from {group.rank}"),
        "barrier": group.barrier(),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_processes_tell_each_other(size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    for rank, heard in enumerate(in_processes(size, talk, port)):
        assert heard == {
            "main": rank == 0,
            "again": True,
            "any": [True, False],
            "sum": [size * (size + 1) / 2] * 2,
            "kept": [rank + 1.0] * 2,
            "gather": [f"from {other}" for other in range(size)],
            "broadcast": "from 0",
            "barrier": None,
        }


def test_job_of_one_process_starts_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert start_group(CPU) is SINGLE
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    assert start_group(CPU) is SINGLE
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("RANK", "-1"), ("RANK", "2"), ("LOCAL_RANK", "x")]
)
def test_wrong_environment_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, number in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", name: value}.items():
        monkeypatch.setenv(key, number)
    with pytest.raises(InputError, match=rf"^{name}: .*{value}"):
        start_group(CPU)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_job_whose_others_do_not_come_is_told(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for key, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, **address}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(RunError, match=rf"^rank {rank} of 2 cannot reach the others: "):
        start_group(CPU)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cuda = torch.device("cuda")
    assert rank_device(cuda, Group(3, 4, 1)) == torch.device("cuda", 1) and chosen == [1]
    assert rank_device(cuda, SINGLE) == cuda and rank_device(CPU, Group(3, 4, 1)) == CPU
    with pytest.raises(RunError, match=r"^device: cuda:2 is not there for local rank 2, 2 CUDA devices"):
        rank_device(cuda, Group(2, 4, 2))
    with pytest.raises(InputError, match=r"^device: .*got cuda:1"):
        rank_device(torch.device("cuda", 1), Group(0, 2, 0))


# --- Training in several processes ---


class Plain(nn.Sequential):
    """Without normalisation over the batch, so that the shares do not show in what is computed."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
            nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
        )  # fmt: skip


class Normed(Plain):
    """The same with batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self[2].insert(0, nn.BatchNorm2d(8))
        self.insert(5, nn.Dropout(0.3))


class Residual(nn.Sequential):
    """Fused blocks, one with a projection."""

    def __init__(self) -> None:
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        blocks = nn.Sequential(FusedBasicBlock(8, 8), FusedBasicBlock(8, 16, 2, shortcut))
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3))


def settings(**fields: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "batch_size": 8,
        "epochs": 2,
        "warmup_epochs": 0.0,
        "lr": 0.05,
        "reuse_memory": False,
        **fields,
    }


def train_here(group: Group, kind: type[nn.Module], fields: dict[str, Any], counts: tuple[int, int]) -> Any:
    """Train, and give what went out of this process."""
    made: list[nn.Module] = []
    seen: list[int] = []

    def make_model(config: TrainConfig, classes: int) -> nn.Module:
        made.append(kind())
        made[0].register_forward_hook(lambda module, args, output: seen.append((module.training, len(output))))
        return made[0]

    console = Console(file=io.StringIO(), width=200)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = train(TrainConfig(**fields), data=make_data(*counts), make_model=make_model, console=console)
    return {
        "accuracy": summary.last_accuracy,
        "finished": summary.finished,
        "text": console.file.getvalue(),
        "seen": seen,
        "warnings": [str(warning.message) for warning in caught],
    }


def job(size: int, kind: type[nn.Module], folder: Path, counts: tuple[int, int] = (45, 13), **fields: Any) -> list[Any]:
    return in_processes(size, train_here, kind, settings(output_dir=folder, **fields), counts)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder)["model"]


def logged(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


MIXED = {"mixup": 0.4, "cutmix": 1.0, "randaugment": (2, 9), "random_erasing": 0.5}


SHARDED = [{"optimizer": name, "fsdp": True} for name in ("nesterov", "adamw", "lars", "muon")]


@pytest.mark.parametrize(
    ("size", "options"), [(2, {}), (3, {}), (2, MIXED), (3, MIXED), *((2, each) for each in SHARDED)], ids=str
)
def test_several_processes_train_as_one(size: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Batches, the last one of an epoch, and 13 test images have uneven shares."""
    tolerance, relative = {"rtol": 1e-5, "atol": 1e-6}, 1e-5
    if options.get("optimizer") in ("lars", "muon"):
        pytest.importorskip("timm")
    if options.get("optimizer") == "muon":
        # It iterates in bfloat16, so each of twelve steps, of up to lr an element, is right to some 2^-7 of itself.
        options = {**options, "lr": 0.004}
        tolerance, relative = {"rtol": 0, "atol": 12 * 0.004 * 2**-7}, 1e-3
    one = {name: value for name, value in options.items() if name != "fsdp"}
    if size == 3:
        options, one = {**options, "batch_size": 10}, {**one, "batch_size": 10}
    counts = (45 if size == 2 else 48, 13)
    job(1, Plain, tmp_path / "one", counts, **one)
    ranks = job(size, Plain, tmp_path / "more", counts, **options)
    for name, expected in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "more")[name], expected, **tolerance, msg=name)
    for mine, theirs in zip(logged(tmp_path / "more"), logged(tmp_path / "one"), strict=True):
        for key in ("train_loss", "test_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=relative)
        for key in ("step", "train_accuracy", "test_accuracy"):
            assert mine[key] == theirs[key]
    losses = [[row["loss"] for row in logged(tmp_path / name, "steps.jsonl")] for name in ("more", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=relative)
    assert len({rank["accuracy"] for rank in ranks}) == 1
    assert all(not rank["text"] for rank in ranks[1:]) and "Training finished" in ranks[0]["text"]
    for rank in ranks:
        assert not rank["warnings"]


@pytest.mark.parametrize("options", [{}, {"fsdp": True}], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_synchronised_processes_train_as_one(size: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Shares are uneven at each step; running statistics are those of the joined batches."""
    counts, batch = (45, 13), 9 if size == 2 else 10
    job(1, Residual, tmp_path / "one", counts, batch_size=batch)
    job(size, Residual, tmp_path / "more", counts, batch_size=batch, sync_bn=True, **options)
    found = weights(tmp_path / "more")
    for name, expected in weights(tmp_path / "one").items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    steps = [[row["loss"] for row in logged(tmp_path / run, "steps.jsonl")] for run in ("more", "one")]
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)


def synchronised_steps(group: Group) -> dict[str, Tensor]:
    """Three steps of descent in float64 on 5 images, by networks of the same first weights."""
    torch.manual_seed(3)
    model = Residual().double()
    compute = parallel.spread(model, group, CPU, static_graph=True, sync_bn=group.size > 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    share = group.share(5)
    for _ in range(3):
        images, labels = torch.rand(5, 3, 8, 8).double()[share], (torch.arange(5) % 3)[share]
        optimizer.zero_grad()
        loss = F.cross_entropy(compute(images), labels) * parallel.loss_weight(group, 5)
        loss.backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("size", [2, 3])
def test_synchronised_processes_train_as_one_in_float64(size: int) -> None:
    one = synchronised_steps(SINGLE)
    for more in in_processes(size, synchronised_steps):
        for name, expected in one.items():
            torch.testing.assert_close(more[name], expected, rtol=1e-10, atol=1e-10, msg=lambda t, n=name: f"{n}: {t}")


def test_without_synchronisation_processes_differ_from_one(tmp_path: Path) -> None:
    for size in (1, 2):
        job(size, Residual, tmp_path / str(size))
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert (one["4.weight"] - two["4.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("test_images", [1, 2, 3, 13])
def test_each_test_image_is_evaluated_once(test_images: int, tmp_path: Path) -> None:
    ranks = job(3, Plain, tmp_path / "run", (12, test_images), batch_size=6, epochs=1, eval_batch_size=2)
    evaluated = [sum(count for training, count in rank["seen"] if not training) for rank in ranks]
    assert sum(evaluated) == test_images and max(evaluated) - min(evaluated) <= 1


def test_last_batch_too_small_for_the_processes_is_left_out(tmp_path: Path) -> None:
    """19 = 8 + 8 + 3, and two processes need two images each."""
    ranks = job(2, Normed, tmp_path / "run", (19, 4), epochs=1)
    for rank in ranks:
        assert [count for training, count in rank["seen"] if training] == [4, 4]


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_resumed_job_ends_with_the_same_weights(fsdp: bool, tmp_path: Path) -> None:
    """With statistics and dropout of each process's own, stopped in the middle of an epoch."""
    job(2, Normed, tmp_path / "whole", fsdp=fsdp, optimizer="adam")
    job(2, Normed, tmp_path / "parts", fsdp=fsdp, optimizer="adam", max_steps=3)
    job(2, Normed, tmp_path / "parts", fsdp=fsdp, optimizer="adam", resume=tmp_path / "parts")
    for name, expected in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "parts")[name], expected), name


def test_end_that_was_not_evaluated_is_evaluated_by_all(tmp_path: Path) -> None:
    """As after a signal in the last evaluation. The checkpoint is the one before last, of which one process tells."""
    fields = {"max_steps": 3, "save_minutes": 1e-9}
    whole = job(2, Plain, tmp_path / "whole", **fields)
    job(2, Plain, tmp_path / "parts", **fields)
    last, previous = tmp_path / "parts" / "last.pt", tmp_path / "parts" / "previous.pt"
    torch.save({**load_checkpoint(last), "evaluated_step": None}, previous)
    last.write_bytes(b"broken")
    ranks = job(2, Plain, tmp_path / "parts", **fields, resume=tmp_path / "parts")
    assert [rank["accuracy"] for rank in ranks] == [rank["accuracy"] for rank in whole]
    assert ["going on from previous.pt, of step 3" in rank["text"] for rank in ranks] == [True, False]
    assert load_checkpoint(last)["evaluated_step"] == 3 and len(logged(tmp_path / "parts")) == 1
    done = in_processes(2, refusal, settings(**fields, output_dir=tmp_path / "parts", resume=tmp_path / "parts"))
    assert all("already done" in text for text in done)


def test_processes_draw_dropout_of_their_own(tmp_path: Path) -> None:
    job(2, Normed, tmp_path / "run", epochs=1)
    first, second = load_checkpoint(tmp_path / "run")["torch_rng"]
    assert not torch.equal(first, second)


def refusal(group: Group, fields: dict[str, Any]) -> str:
    try:
        train_here(group, Plain, fields, (45, 13))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 3}, r"^batch_size: expected at least 2 images for each of 2 processes, got 3"),
        ({"resume": Path("run")}, r"^resume: .*job of 3 processes.*this job has 2"),
        ({"sync_bn": True, "fused": False}, r"^sync_bn: expected --fused on a CPU"),
        ({"resume": Path("nowhere")}, r"^resume: no checkpoint"),
        ({"compile": True, "compile_mode": "reduce-overhead"}, r"^compile_mode: expected a mode without CUDA graphs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_several_processes_is_refused_by_all(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    job(3, Plain, tmp_path / "run", max_steps=1)
    paths = {"resume": tmp_path / fields["resume"]} if "resume" in fields else {}
    for text in in_processes(2, refusal, settings(**{**fields, **paths, "output_dir": tmp_path / "other"})):
        assert re.search(message, text)
    assert not (tmp_path / "other").exists()


def test_sharding_needs_several_processes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^fsdp: .*got one"):
        train_here(SINGLE, Plain, settings(fsdp=True, output_dir=tmp_path / "run"), (45, 13))


def disagree(group: Group) -> tuple[str, str]:
    try:
        with group.agreed():
            if group.rank == 1:
                raise RunError("no space")
    except RunError as error:
        first = str(error)
    try:
        with group.agreed():
            raise InputError("lr: too high")
    except InputError as error:
        return first, str(error)


def test_an_error_of_one_process_is_raised_by_all() -> None:
    assert in_processes(3, disagree) == [("no space (rank 1 of 3 processes)", "lr: too high")] * 3


def accumulate(group: Group, fsdp: bool) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = Plain().double()
    images, labels = torch.rand(6, 3, 8, 8).double(), torch.arange(6) % 3
    if fsdp:
        model = parallel.shard(model, group, CPU)
    compute = parallel.spread(model, group, CPU, static_graph=False)
    for part, last in ((slice(0, 3), False), (slice(3, 6), True)):
        share = group.share(3)
        x, y = images[part][share], labels[part][share]
        with nullcontext() if last else parallel.without_reduction(compute):
            loss = F.cross_entropy(compute(x), y) * parallel.loss_weight(group, 3) / 2
            loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in gradients.items()}


@pytest.mark.parametrize("fsdp", [False, True])
def test_accumulated_gradients_are_those_of_the_joined_batches(fsdp: bool) -> None:
    """In float64; the shares of 3 images are 2 and 1."""
    torch.manual_seed(3)
    model = Plain().double()
    images, labels = torch.rand(6, 3, 8, 8).double(), torch.arange(6) % 3
    F.cross_entropy(model(images), labels).backward()
    for gradients in in_processes(2, accumulate, fsdp):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)


# --- torchrun ---


def torchrun(
    *options: str, to: Path, size: int = 2, restarts: int = 0, fail: str = ""
) -> subprocess.CompletedProcess[str]:
    """A job of tests/train/job.py, started by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    script = ["--module", "tests.train.job", "--output-dir", str(to), "--device", "cpu", "--batch-size", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if fail:
        environment["FAIL"] = fail
    command = [sys.executable, *launcher, *script, "--epochs", "2", "--no-reuse-memory", *options]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def train_tiny(group: Group, folder: Path) -> None:
    """The same job without torchrun."""
    config = TrainConfig(output_dir=folder, device="cpu", batch_size=8, epochs=2, reuse_memory=False, dataset="digits")

    def make_model(resolved: TrainConfig, classes: int) -> nn.Module:
        return TinyNet(classes, TINY_DROPOUT, "cifar")

    train(config, data=make_data(), make_model=make_model, console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the job when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("whole")
    in_processes(2, train_tiny, folder)
    return folder


def assert_ended_like(whole: Path, folder: Path) -> None:
    """The weights are those of the whole job, bit for bit, and each step was logged once."""
    for name, expected in weights(whole).items():
        assert torch.equal(weights(folder)[name], expected), name
    assert [row["step"] for row in logged(folder, "steps.jsonl")] == list(range(1, 13))


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "fastres.train: error:" in line]


def test_killed_process_costs_a_restarted_job_nothing(whole: Path, tmp_path: Path) -> None:
    """Two epochs of six steps; the second process is killed in the second epoch."""
    died = torchrun(to=tmp_path / "died", restarts=1, fail="1:9:killed")
    assert died.returncode == 0, died.stderr
    assert died.stdout.count("Training finished") == 1
    # torchrun says which process it was; or ours does, where it notices first, and then torchrun may name that one.
    said = errors(died.stderr)
    assert said or re.search(r"failed \(exitcode: -9\) local_rank: 1", died.stderr)
    for line in said:
        assert re.search(r"rank 0 of 2: rank 1 \(process \d+\) of 2 has died", line)
    assert_ended_like(whole, tmp_path / "died")


def test_failing_process_ends_the_job_with_one_line(tmp_path: Path) -> None:
    failed = torchrun(to=tmp_path / "run", size=3, fail="1:3:broken")
    assert failed.returncode != 0
    [line] = errors(failed.stderr)
    assert "error: rank 1 of 3: data_dir: broken image cat.png" in line
    assert "InputError: data_dir: broken image cat.png" in failed.stderr  # in torchrun's own summary


@pytest.mark.parametrize(
    ("name", "status", "to"),
    [
        pytest.param("SIGTERM", 143, "*", id="SIGTERM to torchrun"),
        pytest.param("SIGINT", 130, "", id="SIGINT to rank 1", marks=pytest.mark.slow),
        pytest.param("SIGTERM", 143, "", id="SIGTERM to rank 1", marks=pytest.mark.slow),
        pytest.param("SIGINT", 130, "*", id="SIGINT to torchrun", marks=pytest.mark.slow),
    ],
)
def test_signal_stops_all_after_one_step_and_the_job_goes_on(
    whole: Path, tmp_path: Path, name: str, status: int, to: str
) -> None:
    stopped = torchrun(to=tmp_path / "run", fail=f"1:9:{name}{to}")
    assert stopped.returncode != 0
    command = f"torchrun (of 2 processes) -m fastres.train --resume {tmp_path / 'run'}"
    assert f"Stopped by {name}; go on with: {command}" in stopped.stdout.replace("\n", " ").replace("  ", " ")
    assert stopped.stdout.count("Training stopped early") == 1
    if not to:  # else torchrun says nothing of them
        assert re.search(rf"exitcode *: {status}\b", stopped.stderr)
    assert not errors(stopped.stderr)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["stopped_by"], summary["step"], summary["finished"]) == (name, 9, False)
    assert load_checkpoint(tmp_path / "run")["step"] == 9
    went_on = torchrun("--resume", "auto", to=tmp_path / "run")
    assert went_on.returncode == 0, went_on.stderr
    assert_ended_like(whole, tmp_path / "run")


def test_restarted_job_goes_on_after_a_signal_to_one_process(whole: Path, tmp_path: Path) -> None:
    done = torchrun(to=tmp_path / "run", restarts=1, fail="0:3:SIGTERM")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Training finished") == 1
    assert_ended_like(whole, tmp_path / "run")


def signal_at(group: Group, folder: Path, call: int, name: str) -> Any:
    """A run of 2 epochs in which a signal comes to rank 1 alone, in a call of its network."""
    with signal_in_call(call, signal.Signals[name]) if group.rank == 1 else nullcontext():
        return train_here(group, Normed, settings(output_dir=folder), (45, 13))


@pytest.mark.parametrize(
    ("call", "step"), [(12, 6), (13, 6), (15, 7), (26, 12)], ids=["last step of an epoch", "evaluation", "next", "last"]
)
def test_signal_to_one_process_between_two_phases_stops_all(call: int, step: int, tmp_path: Path) -> None:
    """Steps call the two convolutions of the network, and an evaluation of 7 images does so as well."""
    for rank in in_processes(2, signal_at, tmp_path / "run", call, "SIGINT"):
        assert not rank["finished"]
    assert load_checkpoint(tmp_path / "run")["step"] == step


@pytest.mark.parametrize("waited_for", [True, False])
def test_process_that_is_gone_is_named(waited_for: bool, job_of_two: Any) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    if waited_for:
        gone.wait()
    here = socket.gethostname()
    job_of_two.processes = ((here, os.getpid()), (here, gone.pid))
    error = lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert re.search(rf"^rank 1 \(process {gone.pid}\) of 2 has died", str(error))
    gone.wait()


def test_lost_connection_to_a_process_elsewhere_is_told_in_a_line(
    job_of_two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "DEATH_SECONDS", 0.0)
    job_of_two.processes = ((socket.gethostname(), os.getpid()), ("elsewhere", 1))
    error = lost_peer(RuntimeError("[gloo/pair.cc:1] Connection closed by peer [10.0.0.2]:5\nat frame 1"))
    assert str(error).endswith("is lost, the job ends: [gloo/pair.cc:1] Connection closed by peer [10.0.0.2]:5")
    assert lost_peer(RuntimeError("shapes differ")) is None
    assert lost_peer(RunError("no space")) is None
    assert lost_peer(ValueError("gloo")) is None


def test_first_process_to_fail_speaks_for_all(job_of_two: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for reason in ("no space", "the connection is lost"):
        distributed.report_failure("train", RunError(reason))
    assert capsys.readouterr().err == "train: error: rank 0 of 2: no space\n"


def test_each_process_speaks_where_the_store_is_gone(
    job_of_two: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone:
        def add(self, name: str, count: int) -> int:
            raise RuntimeError("Broken pipe")

    job_of_two.store = Gone()
    distributed.report_failure("train", RunError("rank 1 has died"))
    assert capsys.readouterr().err == "train: error: rank 0 of 2: rank 1 has died\n"


@pytest.mark.parametrize(("rank", "waited"), [("0", []), ("1", [distributed.PATIENCE_SECONDS])])
def test_error_before_the_job_is_formed_is_told_by_the_first_rank(
    rank: str, waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait to be ended, and speak where nobody does."""
    slept: list[float] = []
    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    distributed.report_failure("train", InputError("lr: too high"))
    assert capsys.readouterr().err == "train: error: lr: too high\n" and slept == waited


def test_peer_lost_while_training_ends_the_command_with_status_2(
    job_of_two: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: TrainConfig) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(distributed, "DEATH_SECONDS", 0.0)
    monkeypatch.setattr(command, "train", fail)
    reason = "gloo: Connection closed by peer"
    assert command.main([]) == 2
    assert "rank 0 of 2: the connection to another rank is lost" in capsys.readouterr().err
    reason = "shapes differ"
    with pytest.raises(RuntimeError, match=r"shapes differ"):
        command.main([])


@pytest.fixture
def job_of_two(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is known of a job whose other process this one can no longer reach."""
    here = (socket.gethostname(), os.getpid())
    for name, value in {"group": Group(0, 2), "store": dist.HashStore(), "processes": (here, here)}.items():
        monkeypatch.setattr(distributed._Job, name, value)
    return distributed._Job


def test_job_restarted_before_its_first_checkpoint_begins_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=r"already holds a run"):
        train_here(SINGLE, Plain, settings(output_dir=tmp_path, max_steps=2), (45, 13))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_here(SINGLE, Plain, settings(output_dir=tmp_path, max_steps=2), (45, 13))
    train_here(SINGLE, Plain, settings(output_dir=tmp_path, max_steps=4), (45, 13))
    assert [row["step"] for row in logged(tmp_path, "steps.jsonl")] == [1, 2, 3, 4]


def test_restarts_need_a_folder_that_they_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(InputError, match=r"^output_dir: torchrun --max-restarts needs one"):
        train_here(SINGLE, Plain, settings(), (45, 13))
