import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from fastres.ops.algorithms import ALGORITHMS
from fastres.train import __main__ as cli
from fastres.train.config import (
    ConvAlgorithm,
    Dataset,
    Optimizer,
    TrainConfig,
    check_config,
    from_dict,
    resolve,
    to_dict,
)
from fastres.train.errors import InputError
from fastres.train.prepare import configured_model

OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("model", "resnet19"),
    ("dataset", "mnist"),
    ("optimizer", "lion"),
    ("schedule", "staircase"),
    ("model", "wrn27-10"),
    ("flip", "vertical"),
    ("crop_border", "edge"),
    ("tta", "crops"),
    ("width", 0.0),
    ("accumulate", 0),
    ("bias_lr_factor", 0.0),
    ("clip_grad", 0.0),
    ("milestones", (2.0, 1.0)),
    ("milestones", (0.0,)),
    ("step_factor", -0.1),
    ("triangle_start", 1.1),
    ("triangle_peak", 1.5),
    ("triangle_end", -0.1),
    ("warmup_factor", 0.0),
    ("ema_decay", 1.0),
    ("lookahead_period", 0),
    ("lookahead_decay", 1.0),
    ("crop_padding", -1),
    ("mixup", -0.1),
    ("mixup", 1e-300),
    ("cutmix", 0.04),
    ("mixup", float("nan")),
    ("cutmix", float("inf")),
    ("randaugment", (2,)),
    ("randaugment", (0, 9)),
    ("randaugment", (2, 31)),
    ("randaugment", (2, -1)),
    ("randaugment", (2, 9, 1)),
    ("random_erasing", 1.1),
    ("random_erasing", -0.1),
    ("whitening_bias_epochs", -1.0),
    ("stem", "tiny"),
    ("amp", "fp8"),
    ("conv_algorithm", "fft"),
    ("compile_mode", "fast"),
    ("epochs", 0),
    ("max_steps", 0),
    ("batch_size", 1),
    ("eval_batch_size", 0),
    ("eval_epochs", 0),
    ("threads", 0),
    ("image_size", 0),
    ("workers", -1),
    ("seed", -1),
    ("lr", 0.0),
    ("lr", -0.1),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("weight_decay", -1e-4),
    ("warmup_epochs", -1.0),
    ("momentum", 1.0),
    ("label_smoothing", 1.0),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("device", "tpu"),
    ("device", "mps"),
]


def test_default_configuration_is_valid() -> None:
    check_config(TrainConfig())


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name}: "):
        check_config(TrainConfig(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", "3"), ("epochs", True), ("milestones", [1.0]), ("batch_size", True),
     ("mixup", "0.2"), ("randaugment", [2, 9]), ("randaugment", (2, 9.0)), ("randaugment", (2, True)),
     ("lr", "fast"), ("fused", 1), ("data_dir", "data"),
     ("model", None), ("seed", None), ("output_dir", "runs"), ("amp", None), ("conv_algorithm", True)],
)  # fmt: skip
def test_value_of_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: "):
        check_config(TrainConfig(**{name: value}))


def test_every_algorithm_that_the_environment_may_name_can_be_saved_with_a_run() -> None:
    assert set(get_args(ConvAlgorithm)) == {*ALGORITHMS, "direct"}


@pytest.mark.parametrize("algorithm", get_args(ConvAlgorithm))
def test_convolution_algorithm_of_a_plain_network_is_refused(algorithm: Any) -> None:
    check_config(TrainConfig(conv_algorithm=algorithm))
    with pytest.raises(InputError, match=rf"^conv_algorithm: .*--no-fused.*{algorithm}"):
        check_config(TrainConfig(conv_algorithm=algorithm, fused=False))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"schedule": "step"}, "milestones"),
        ({"milestones": (1.0,)}, "milestones"),
        ({"schedule": "triangle", "warmup_epochs": 1.0}, "warmup_epochs"),
        ({"ema_decay": 0.9, "lookahead_period": 5}, "ema_decay"),
        ({"ema_decay": 0.9, "fsdp": True}, "ema_decay"),
        ({"lookahead_period": 5, "fsdp": True}, "lookahead_period"),
        ({"clip_grad": 1.0, "fsdp": True}, "clip_grad"),
        ({"batch_size": 7, "accumulate": 4}, "accumulate"),
        ({"compile": True, "compile_mode": "reduce-overhead", "accumulate": 2}, "accumulate"),
    ],
)
def test_options_in_conflict_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=rf"^{named}: "):
        check_config(TrainConfig(**fields))


def test_float16_is_refused_where_there_is_no_gpu() -> None:
    with pytest.raises(InputError, match=r"^amp: .*fp16.*cpu"):
        resolve(TrainConfig(amp="fp16", device="cpu"), dataset="digits", image_size=32)


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(InputError, match=r"^warmup_epochs: .*epochs = 2"):
        check_config(TrainConfig(epochs=2, warmup_epochs=3.0))


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"warmup_epochs": 6.0}, "warmup_epochs"), ({"accumulate": 9}, "accumulate"),
     ({"tta": "flip+shift", "image_size": None}, "tta")],
)  # fmt: skip
def test_options_in_conflict_with_a_default_are_named(fields: dict[str, Any], named: str) -> None:
    """Before the run, whose checkpoints, which hold the defaults, could not be resumed."""
    check_config(TrainConfig(**fields))
    with pytest.raises(InputError, match=rf"^{named}: "):
        resolve(TrainConfig(**fields), dataset="digits", image_size=1)


@pytest.mark.parametrize("dataset", [d for d in get_args(Dataset) if d != "auto"])
@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_resolved_configuration_is_complete_and_survives_json(dataset: Any, optimizer: Any) -> None:
    resolved = resolve(TrainConfig(optimizer=optimizer, amp="auto"), dataset=dataset, image_size=32)
    unset = {name for name, value in to_dict(resolved).items() if value in (None, "auto")}
    # The convolution's "auto" is an algorithm, which chooses anew for every call.
    assert unset == {
        "output_dir", "resume", "max_steps", "threads", "dropout", "conv_algorithm", "recipe", "pretrained",
        "clip_grad", "warmup_factor", "ema_decay", "lookahead_period", "flip", "crop_padding", "whitening_bias_epochs",
    }  # fmt: skip
    assert from_dict(json.loads(json.dumps(to_dict(resolved)))) == resolved


def test_resolving_keeps_what_was_given() -> None:
    given = TrainConfig(
        lr=0.3, weight_decay=0.0, epochs=7, batch_size=9, warmup_epochs=0.0, stem="imagenet", device="cpu"
    )
    resolved = resolve(given, dataset="digits", image_size=32)
    assert (resolved.lr, resolved.weight_decay, resolved.epochs, resolved.batch_size) == (0.3, 0.0, 7, 9)
    assert (resolved.warmup_epochs, resolved.stem, resolved.device) == (0.0, "imagenet", "cpu")


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        (None, None, "auto"),
        (None, "winograd", "winograd"),
        ("torch", "winograd", "torch"),
        ("auto", "torch", "auto"),
    ],
)
def test_convolution_algorithm_is_the_option_or_the_variable(
    given: Any, variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is None:
        monkeypatch.delenv("FASTRES_CONV", raising=False)
    else:
        monkeypatch.setenv("FASTRES_CONV", variable)
    resolved = resolve(TrainConfig(conv_algorithm=given), dataset="digits", image_size=32)
    assert resolved.conv_algorithm == expected
    assert resolve(TrainConfig(fused=False), dataset="digits", image_size=32).conv_algorithm is None


def test_wrong_algorithm_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_CONV", "fft")
    with pytest.raises(InputError, match=r"^FASTRES_CONV: .*'fft'"):
        resolve(TrainConfig(), dataset="digits", image_size=32)


@pytest.mark.parametrize(("size", "stem"), [(32, "cifar"), (64, "cifar"), (65, "imagenet"), (224, "imagenet")])
def test_stem_follows_the_image_size(size: int, stem: str) -> None:
    assert resolve(TrainConfig(), dataset="imagefolder", image_size=size).stem == stem


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (6, 1, 5), (64, 1, 8), (16, 4, 3)])
def test_workers_leave_a_core_to_the_gpus_process(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for device, expected in (("cuda", workers), ("cpu", 1), ("cpu:0", 1)):
        config = resolve(TrainConfig(device=device), dataset="imagefolder", image_size=224)
        assert config.workers == expected
    assert resolve(TrainConfig(workers=0), dataset="imagefolder", image_size=224).workers == 0


def test_saved_configuration_with_other_fields_is_refused() -> None:
    values = to_dict(TrainConfig())
    values["colour"] = values.pop("seed")
    with pytest.raises(InputError, match=r"missing .*seed.* unknown .*colour"):
        from_dict(values)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configurations that the command line hands to train()."""
    seen: list[TrainConfig] = []

    class Finished:
        finished = True
        stopped_by = None

    def record(config: TrainConfig) -> Finished:
        seen.append(config)
        return Finished()

    monkeypatch.setattr(cli, "train", record)
    return seen


@pytest.mark.parametrize(("flag", "fused"), [("--fused", True), ("--no-fused", False)])
def test_flag_chooses_fused_or_plain(parsed: list[TrainConfig], flag: str, fused: bool) -> None:
    assert cli.main([flag]) == 0
    assert parsed == [TrainConfig(fused=fused)]


def test_options_of_several_numbers_are_read_from_the_command_line(parsed: list[TrainConfig]) -> None:
    assert cli.main(["--randaugment", "2", "9", "--schedule", "step", "--milestones", "3", "4.5"]) == 0
    assert (parsed[0].randaugment, parsed[0].milestones) == ((2, 9), (3.0, 4.5))


def test_recipe_of_the_article_is_the_one_that_was_published(parsed: list[TrainConfig]) -> None:
    assert cli.main(["--recipe", "article"]) == 0
    config = parsed[0]
    assert (config.model, config.dataset, config.batch_size, config.optimizer) == ("article", "cifar10", 128, "adam")
    assert (config.lr, config.weight_decay, config.epochs, config.schedule) == (1e-3, 1e-4, 100, "constant")


def test_options_are_checked_together_with_the_checkpoints(
    parsed: list[TrainConfig], run: Callable[..., Any], tmp_path: Path
) -> None:
    run(schedule="step", milestones=(1.0,), max_steps=1)
    assert cli.main(["--resume", str(tmp_path / "run"), "--milestones", "1"]) == 0
    assert (parsed[0].schedule, parsed[0].milestones) == ("step", (1.0,))


@pytest.mark.parametrize(
    "arguments", [["--lr=-1"], ["--model", "vgg"], ["--dropout", "1"], ["--resume", "nowhere"],
                  ["--dataset", "imagefolder", "--data-dir", "nowhere"],
                  ["--no-fused", "--conv-algorithm", "winograd"],
                  ["--dataset", "digits", "--width", "1e300"], ["--dataset", "digits", "--width", "1e6"],
                  ["--dataset", "digits", "--model", "fast", "--stem", "imagenet"]],
)  # fmt: skip
def test_wrong_argument_ends_the_command_with_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert ": error: " in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "fits"), [(8, False), (9, True)])
def test_network_for_larger_images_is_refused(size: int, fits: bool) -> None:
    config = resolve(TrainConfig(model="fast", width=0.1), dataset="imagefolder", image_size=size)
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match=r"^image_size: fast expects 9 .*got 8$"):
        configured_model(config, 10)


def test_help_describes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in to_dict(TrainConfig()):
        assert f"--{name.replace('_', '-')}" in text
        assert f"\n        {name}: " in (TrainConfig.__doc__ or "")
