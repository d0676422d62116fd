"""`python -m benchmarks.roofline`: byte models of a training step on a GPU, and the traces that they are made from."""
