"""The errors that a user meets. Each carries one line that says what was wrong, with which value, and what to do."""


class HastenError(Exception):
    """Anything that hasten refuses or could not do."""


class ConfigError(HastenError, ValueError):
    """The request makes no sense as written. The command line ends with exit code 2.

    Args:
        problems: one line each; all that were found, not only the first.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class PassError(HastenError):
    """A technique can't be applied to this model: diverged training, nothing to prune, too few rows to calibrate."""


class EngineError(HastenError):
    """An engine is missing, refused the graph, crashed, or its outputs differ from the model's."""


class MeasurementError(HastenError):
    """A measurement could not be finished."""


def first_line(error: BaseException) -> str:
    """What a library says before it goes into details; the kind of the error where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
