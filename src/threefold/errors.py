"""What a user can get wrong, one class per place to look.

    ThreefoldError            the command line prints its message as one line and exits with code 2
    ├── ConfigError           a recipe or a flag: the message names the field, its value and the fix
    ├── DataError             a dataset: the message names the file, the row and the field
    ├── CheckpointError       a model or run directory: the message names the directory and what is missing in it
    └── TrainingError         a run that must not go on (a non-finite loss, say): the message names stage and step

Preempted is no mistake: somebody asked the run to stop, and it has. Everything else that is raised is a bug of ours and
keeps its traceback.
"""


class ThreefoldError(ValueError):
    """Base of every error that the user can mend; its message is one line and says how."""


class ConfigError(ThreefoldError):
    """A field of the recipe, or a flag, has a value that cannot work."""


class DataError(ThreefoldError):
    """A dataset, or one row of it, cannot be used as the recipe asks."""


class CheckpointError(ThreefoldError):
    """A model directory, a run directory or a tokenizer is missing, damaged or not the one expected."""


class TrainingError(ThreefoldError):
    """Training reached a state from which it must not go on; what was finished before is on disk."""


class ParityError(TrainingError):
    """What generates is not what trains: their log-probs of the same tokens differ beyond the recipe's bound."""


class NonFiniteError(TrainingError):
    """NaN or infinity came out of a model, or out of a loss."""


class Preempted(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop (SIGTERM) and has written its checkpoint; the command line prints the line and exits
    with code 143."""
