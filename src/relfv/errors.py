"""The errors a user may see, each one line: what, where, what was found, what was expected, the remedy."""


class RelfvError(Exception):
    """Base of all errors that relfv explains itself. ``exit_code`` is the status of the process."""

    exit_code = 1


class InputError(RelfvError):
    """Something given to relfv is wrong: a flag, a file, a model, a setting. Nothing was computed."""

    exit_code = 2


class DeviceTaken(InputError):
    """A device exists but lets this process in no more, since another process has it."""


class RunError(RelfvError):
    """The input was accepted and the run failed. What was computed before is on disk."""

    exit_code = 1


class UsageWarning(UserWarning):
    """A vector is used on a prompt or a model that is not what it was made with, and what comes out may mean
    nothing."""


def in_words(problem: Exception) -> str:
    """Describe a failure as a status, a log or a page states it; an error that is not relfv's own gets its class name,
    too."""
    return str(problem) if isinstance(problem, RelfvError) else f"{type(problem).__name__}: {problem}"


def first_line(problem: Exception) -> str:
    """The first line of the message of another library's error, which may go on for pages; its class name where the
    message is empty."""
    return str(problem).strip().split("\n")[0] or type(problem).__name__
