from pathlib import Path
from typing import Any

import pytest
import torch

from fastres.train import checkpoint as ckpt
from fastres.train.errors import InputError, RunError
from fastres.train.folder import write_text


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    ckpt.save_checkpoint(path, {"step": 1})
    before = path.read_bytes()

    def save_half(state: Any, target: Path) -> None:
        target.write_bytes(before[: len(before) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(RunError, match=r"no space"):
        ckpt.save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_text(path, "a long first text")
    write_text(path, "short")
    assert path.read_text() == "short"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^resume: .*last\.pt"):
        ckpt.load_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_checkpoint_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    torch.save({key: torch.ones(1000) for key in ckpt.KEYS}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"^resume: .*truncated or not a checkpoint"):
        ckpt.load_checkpoint(path)


class Trap:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "sprung"))


def test_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"model": Trap(tmp_path / "trap")}, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"^resume: "):
        ckpt.load_checkpoint(tmp_path)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.ones(3)], ids=["weights", "list", "tensor"])
def test_file_of_another_program_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"not a checkpoint of this trainer"):
        ckpt.load_checkpoint(tmp_path)


def test_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    torch.save({**dict.fromkeys(ckpt.KEYS), "format": ckpt.FORMAT + 1}, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"format"):
        ckpt.load_checkpoint(tmp_path)


def test_checkpoint_without_a_usable_configuration_is_refused(tmp_path: Path) -> None:
    torch.save({**dict.fromkeys(ckpt.KEYS), "format": ckpt.FORMAT, "config": {"lr": 1}}, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"^resume: .*does not fit this version"):
        ckpt.saved_config(tmp_path)
