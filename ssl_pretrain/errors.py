"""What can go wrong, and the exit code that says so to a shell or a scheduler.

    SslPretrainError        70  training failed (non-finite loss, nothing learned with `stop`)
    ├── NotProven            1  a consumer does not hold the weights of what was exported
    ├── UsageError          64  wrong arguments or recipe
    ├── DataError           65  the data cannot be used
    ├── WriteError          74  cannot write the output
    └── Stopped             75  stopped on request; the same command continues

Every message is one line that says what is wrong and what to do.
"""


class SslPretrainError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback."""

    exit_code = 70


class UsageError(SslPretrainError):
    """Wrong arguments, or a recipe that cannot be run."""

    exit_code = 64


class NotProven(SslPretrainError):
    """An export was verified, and the consumer does not hold its weights."""

    exit_code = 1


class DataError(SslPretrainError):
    """The images or labels cannot be used."""

    exit_code = 65


class WriteError(SslPretrainError):
    """The output cannot be written, or another process writes it."""

    exit_code = 74


class Stopped(SslPretrainError):
    """Stopped by a signal after saving; starting the same command again continues the run."""

    exit_code = 75
