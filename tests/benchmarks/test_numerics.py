"""The table of rounding errors: what an error is, and that the page is what the script writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.numerics import Case, Config, Errors, from_json, inference, main, measure, page, relative, table
from benchmarks.records import PUBLISHED, ROOT

MACHINE = {
    "processor": "A CPU", "capability": "AVX2", "threads": 2, "torch": "2.14", "date": "2026-01-02", "draws": 1,
}  # fmt: skip


def off_by(error: float) -> Case:
    """x * w, and the same with a known relative error."""

    def product(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    shapes = ((2, 3, 4, 4), (2, 3, 4, 4))
    return Case("product", "", torch.float32, shapes, lambda x, w: x * w * (1 + error), product)


def test_an_error_is_over_the_largest_value() -> None:
    expected = torch.tensor([4.0, -8.0, 1.0], dtype=torch.float64)
    assert relative(expected.float() + torch.tensor([0.0, 0.0, 0.5]), expected) == 0.5 / 8


def test_output_and_both_gradients_are_compared_with_float64() -> None:
    found = measure(off_by(1e-3), draws=2, seed=0)
    for quantity in ("output", "input gradient", "weight gradient"):
        assert found.fastres[quantity] == pytest.approx(1e-3, rel=1e-2)
        assert 0 < found.torch[quantity] < 1e-6


def test_a_side_is_never_compared_with_itself() -> None:
    """Inputs are rounded before the oracle sees them, so that only what is computed counts."""
    case = off_by(0.0)._replace(dtype=torch.bfloat16)
    found = measure(case, draws=1, seed=0)
    assert found.fastres["output"] == found.torch["output"] <= torch.finfo(torch.bfloat16).eps / 2


def test_a_case_without_gradients_has_an_output_alone() -> None:
    (case,) = inference((1, 16, 4, 4), "gemm")
    found = measure(case, draws=1, seed=0)
    assert list(found.fastres) == list(found.torch) == ["output"]
    assert found.fastres["output"] < 1e-5
    shown = table(
        MACHINE, [found, Errors("ResNet-18, logits", "", "float32", "2x3x32x32", {"logits": 2e-6}, {"logits": 1e-6})]
    )
    assert "| `conv3x3_norm_act` | gemm | 1x16x4x4 | float32 |" in shown
    assert "| ResNet-18, logits | 2x3x32x32 | float32 | 2.0e-06 | 1.0e-06 |" in shown


def test_the_committed_page_is_what_the_script_writes() -> None:
    text = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- numerics -->\n")[2].partition("<!-- /numerics -->")[0]
    assert shown and shown == page(PUBLISHED), "run `python -m benchmarks.numerics --no-compute`"


def test_the_page_is_written_anew_without_computing(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- numerics -->\nold\n<!-- /numerics -->\nafter\n")
    main(Config(output_dir=PUBLISHED, page=file, compute=False))
    assert file.read_text() == f"before\n<!-- numerics -->\n{page(PUBLISHED)}<!-- /numerics -->\nafter\n"


def test_another_file_of_json_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "numerics-x.json"
    other.write_text('{"machine": {}, "errors": [{"operator": "x"}]}')
    with pytest.raises(ValueError, match=r"output_dir: .*numerics-x.json does not hold errors of this script"):
        from_json(other)
