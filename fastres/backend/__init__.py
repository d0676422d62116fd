"""torch.compile(model, backend="fastres"): any network's graph, with what it has of ours computed by our operators.

Dynamo hands every network as a graph of torch's calls, whatever classes it is written with. Patterns in there, a file
each, are replaced by calls of `fastres.functional`; the rest stays as it is.
"""

from fastres.backend.compiler import compile, fastres
from fastres.backend.report import CompileReport, GraphReport, Left, compile_report

__all__ = ["CompileReport", "GraphReport", "Left", "compile", "compile_report", "fastres"]
