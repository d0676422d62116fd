"""fastres against PyTorch eager and torch.compile.

`pytest benchmarks/ --benchmark-only`, and `python -m benchmarks.results` for the published table and plot.
"""
