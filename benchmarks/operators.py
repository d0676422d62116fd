"""Which operators a function calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_WITHOUT_KERNEL = ("aten::detach", "aten::empty", "aten::new_empty", "prim::", "profiler::")


def has_kernel(operator: Any) -> bool:
    """Whether an overload of an operator computes anything: a view does not, nor does what only makes a tensor."""
    return not operator.is_view and not operator.name().startswith(_WITHOUT_KERNEL)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, views and other things without a kernel left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if has_kernel(func):
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def operator_calls(run: Callable[[], object]) -> Counter[str]:
    """Operator -> how often it is called."""
    with _Counting() as counting:
        run()
    calls: Counter[str] = counting.calls
    return calls
