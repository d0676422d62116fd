"""Triton kernels and their launchers, installed as `fastres.kernels`."""
