"""The table: rows are what users do, columns the modules that they do it to."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.altered.compare import Draw, Results, in_doubt, observe, problems
from tests.altered.subjects import SUBJECTS, Subject
from tests.operators import Operators
from tests.oracle import SEED

DRAWS = 4

# The whole table takes minutes. A run takes every row, each on columns of its own choice: the seed's.
WHOLE = os.environ.get("FASTRES_TEST_ALTERED") == "all"
COLUMNS = 3


@dataclass(frozen=True)
class Row:
    """One thing that users do.

    Attributes:
        act: act(model, draw). A change alters the module, or returns another; a use returns its results.
        refused: exceptions that PyTorch itself may raise; ours has to raise the same.
        exact: whether float64 tells what is right. Otherwise (random numbers, other dtypes) plain float32 does.
        low_precision: compare whole tensors, as the bits of an element are too few.
    """

    name: str
    act: Callable[[nn.Module, Draw], Any]
    changes: bool
    refused: tuple[type[Exception], ...]
    exact: bool
    low_precision: bool

    def run(self, model: nn.Module, draw: Draw) -> Results:
        warm(model, draw)
        torch.default_generator.manual_seed(1)  # without a word to the GPUs, which costs as much as the module
        if self.changes:
            model = self.alter(model, draw)
            results = observe(model, draw)
        else:
            results = self.act(model, draw)
        return results | draw.seen

    def alter(self, model: nn.Module, draw: Draw) -> nn.Module:
        """The altered module: what a row returns, or what it was given."""
        altered = self.act(model, draw)
        model = altered if isinstance(altered, nn.Module) else model
        return model.double() if draw.dtype is torch.float64 else model


def warm(model: nn.Module, draw: Draw) -> None:
    """Whatever a module may keep from an evaluation, it keeps by the time that it is altered."""
    modes = {m: m.training for m in model.modules()}
    with torch.no_grad():
        model.eval()(draw.x(9).detach().to(next(model.parameters()).dtype))
    for m, mode in modes.items():
        m.training = mode


def outcome(row: Row, model: nn.Module, draw: Draw) -> Results | Exception:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return row.run(model, draw)
        except Exception as error:
            return error


def exact_model(row: Row, subject: Subject) -> nn.Module:
    # A changed module is turned to float64 after its change, so that new parameters start with the same values.
    model = subject.make_plain()
    return model if row.changes else model.double()


def once(
    row: Row, subject: Subject, attempt: int, make_ours: Callable[[], nn.Module], our_row: Row
) -> tuple[list[str], bool]:
    """(differences, whether a ReLU is in doubt)."""
    key = (row.name, subject.name, attempt)
    theirs = outcome(row, subject.make_plain(), Draw(subject, key))
    ours = outcome(our_row, make_ours(), Draw(subject, key))
    if isinstance(theirs, Exception):
        if not isinstance(theirs, row.refused):
            raise AssertionError(f"{row.name}: plain PyTorch refuses it: {describe(theirs)}") from theirs
        same = type(ours) is type(theirs)
        return [] if same else [f"{describe(ours)}, expected {describe(theirs)}"], False
    if isinstance(ours, Exception):
        raise AssertionError(f"{row.name}: {describe(ours)}") from ours
    exact = None
    if row.exact and not identical(ours, theirs):
        found = outcome(row, exact_model(row, subject), Draw(subject, key, torch.float64))
        if isinstance(found, Exception):
            raise AssertionError(f"{row.name}: not in float64: {describe(found)}") from found
        exact = found
    different = problems(subject, ours, theirs, exact, low_precision=row.low_precision)
    doubt = False
    if different:
        with Operators() as seen:
            outcome(row, exact_model(row, subject), Draw(subject, key, torch.float64))
        # In low precision rounding flips a ReLU here and there. Errors of ours show with every draw, a flip does not.
        doubt = row.low_precision or in_doubt(seen.relu_inputs)
    return different, doubt


def identical(ours: Results, theirs: Results) -> bool:
    """Whether all is the same bit for bit, as it is where PyTorch's own operators ran: float64 need not be asked."""
    pairs = [(ours.get(name), value) for name, value in theirs.items() if isinstance(value, torch.Tensor)]
    return all(isinstance(a, torch.Tensor) and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def describe(outcome: Results | Exception) -> str:
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__}: {str(outcome).splitlines()[0] if str(outcome) else ''}"
    return "no exception"


def check(
    row: Row, subject: Subject, make_ours: Callable[[], nn.Module] | None = None, our_row: Row | None = None
) -> None:
    """Compare; with other random numbers where the sign of a ReLU's input was in doubt.

    Args:
        make_ours, our_row: what is done to which module of ours, where it is not the row to the fused one.
    """
    for attempt in range(DRAWS):
        different, doubt = once(row, subject, attempt, make_ours or subject.make_fused, our_row or row)
        if not different or not doubt:
            break
    if different:
        shown = "\n  ".join(different[:12])
        pytest.fail(f"{row.name}, {subject}: {len(different)} differences\n  {shown}", pytrace=False)


class Table:
    """Rows, each with its columns."""

    def __init__(self) -> None:
        self.cases: list[tuple[Row, Subject]] = []

    def _add(self, changes: bool, name: str, columns: Sequence[Subject], needs: Any, **options: Any) -> Any:
        def add(act: Callable[[nn.Module, Draw], Any]) -> Callable[[nn.Module, Draw], Any]:
            row = Row(name, act, changes, **options)
            found = [s for s in columns if needs is None or needs(s.make_plain())]
            assert found, f"{name}: no module to do it to"
            assert all(name != other.name for other, _ in self.cases), f"{name}: two rows of one name"
            self.cases += [(row, s) for s in found]
            return act

        return add

    def change(
        self,
        name: str,
        columns: Sequence[Subject] = SUBJECTS,
        *,
        needs: Callable[[nn.Module], bool] | None = None,
        refused: tuple[type[Exception], ...] = (),
        exact: bool = True,
        low_precision: bool = False,
    ) -> Any:
        """A row that alters the module; it is then trained and evaluated."""
        return self._add(True, name, columns, needs, refused=refused, exact=exact, low_precision=low_precision)

    def use(
        self,
        name: str,
        columns: Sequence[Subject] = SUBJECTS,
        *,
        needs: Callable[[nn.Module], bool] | None = None,
        refused: tuple[type[Exception], ...] = (),
        exact: bool = True,
        low_precision: bool = False,
    ) -> Any:
        """A row that uses the module in its own way and returns what came out."""
        return self._add(False, name, columns, needs, refused=refused, exact=exact, low_precision=low_precision)

    def every(self, *columns: Subject) -> Any:
        """Parametrises a test of (row, subject), with those columns alone where some are named."""
        cases = [(row, s) for row, s in self.cases if not columns or s in columns]
        if not WHOLE:
            chooser = random.Random(f"{SEED}columns")
            by_row: dict[str, list[tuple[Row, Subject]]] = {}
            for case in cases:
                by_row.setdefault(case[0].name, []).append(case)
            cases = [case for row in by_row.values() for case in chooser.sample(row, min(COLUMNS, len(row)))]
        return pytest.mark.parametrize(
            ("row", "subject"), [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in cases]
        )
