"""The errors a user may see, each one line: what, where, what was found, what was expected, the remedy."""


class RelfvError(Exception):
    """Base of all errors that relfv explains itself. ``exit_code`` is the status of the process."""

    exit_code = 1


class InputError(RelfvError):
    """Something given to relfv is wrong: a flag, a file, a model, a setting. Nothing was computed."""

    exit_code = 2


class DeviceTaken(InputError):
    """A device that is there lets this process in no more, since another has it."""


class RunError(RelfvError):
    """The input was accepted and the run failed. What was computed before is on disk."""

    exit_code = 1


class UsageWarning(UserWarning):
    """A vector is used on a prompt or a model that is not what it was made with, and what comes out may mean
    nothing."""


def in_words(problem: Exception) -> str:
    """What a status, a log or a page says of a failure; of one that relfv does not explain itself its kind, too."""
    return str(problem) if isinstance(problem, RelfvError) else f"{type(problem).__name__}: {problem}"


def first_line(problem: Exception) -> str:
    """Of an error of another library, whose message may go on for pages; its kind where it says nothing."""
    return str(problem).strip().split("\n")[0] or type(problem).__name__
