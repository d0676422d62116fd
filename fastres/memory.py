"""The C allocator's settings for large buffers on the CPU."""

from __future__ import annotations

from fastres import _extension


def reuse_cpu_memory() -> bool:
    """Make the C allocator keep large buffers that were freed and hand them out again.

    glibc returns a large buffer to the kernel at every free, and every next use pays for its page faults, which can
    take longer than the arithmetic. Call it once, at the start, before large tensors exist; importing the library does
    not. The cost: memory that was once used stays with the process until it ends, whoever in it used it, and it takes
    glibc about ten aligned buffers of a size until it hands freed ones out again, so the process grows by as much.

    Returns:
        True where it took effect; False, and nothing is changed, where the allocator is not glibc's or the CPU module
        cannot be had.
    """
    module = _extension.load_cpu()
    return module is not None and bool(module.reuse_memory(True))
