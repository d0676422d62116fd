"""What the compilers make of the GPU kernels, as tables in docs/. Nothing here needs a GPU."""
