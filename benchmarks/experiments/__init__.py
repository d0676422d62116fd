"""Questions about training residual networks, each answered by a command: `python -m benchmarks.experiments NAME`."""
