"""What can go wrong for reasons that lie outside the program, each told in one sentence."""


class InputError(ValueError):
    """An argument, a data folder or a checkpoint is not what it should be; nothing has been written."""


class RunError(RuntimeError):
    """The environment does not allow the run: no such device, no network for a download, no space."""


class DivergedError(RunError):
    """The loss became NaN or infinite; training stopped at the step named."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says, at most 160 characters; or its class."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
