"""The names of a workload's sides, apart from benchmarks.workloads because that takes torch to import."""

from __future__ import annotations

EAGER, COMPILE, FUSED = SIDES = ("eager", "compile", "fused")
# On a GPU only.
MAX_AUTOTUNE, FUSED_COMPILE, FUSED_GRAPH = ("max-autotune", "fused-compile", "fused-graph")
COMPILERS = (COMPILE, MAX_AUTOTUNE)
OURS = (FUSED, FUSED_COMPILE, FUSED_GRAPH)
