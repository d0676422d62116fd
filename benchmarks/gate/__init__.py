"""A gate for performance without a clock: what the code does is counted and compared with a committed baseline."""
