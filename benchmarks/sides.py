"""The names of a workload's sides, apart from benchmarks.workloads because that takes torch to import."""

from __future__ import annotations

EAGER, COMPILE, FUSED = SIDES = ("eager", "compile", "fused")
# On a GPU only.
MAX_AUTOTUNE, FUSED_COMPILE = ("max-autotune", "fused-compile")
# A whole training step as one CUDA graph, in which launches cost the host nothing, whoever makes them.
GRAPHS = EAGER_GRAPH, COMPILE_GRAPH, FUSED_GRAPH = ("eager-graph", "compile-graph", "fused-graph")
# Other networks: whole graphs by the compiler backend, and frozen ones.
BACKEND, FROZEN_GRAPH = ("backend", "frozen-graph")
COMPILERS = (COMPILE, MAX_AUTOTUNE, COMPILE_GRAPH)
OURS = (FUSED, FUSED_COMPILE, FUSED_GRAPH)
