"""What runs on a GPU machine: `python -m benchmarks.gpu` and the commands that its stages run.

Nothing is imported here: the driver runs where nothing of ours has been built.
"""
