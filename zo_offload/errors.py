"""Every error that a user can cause, by where it arises.

A message says what is wrong, where, both numbers where there are two, and the mend, on one line.
Our own bugs are ``assert``; these are not.
"""


class ZOError(Exception):
    """Base of all errors raised on purpose by this package.

    Attributes:
        is_told: Another rank raises the same, and says so.
    """

    is_told = False


class ConfigError(ZOError, ValueError):
    """A key, value or combination in the JSON or on the command line that cannot be honoured."""

    def __init__(self, text: str, others: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.others = others  # mistakes that were seen beside the first, one line each


class TaskError(ZOError, ValueError):
    """A data file, prompt or label that cannot be used; names file and line."""


class ModelError(ZOError, ValueError):
    """A model that cannot be trained as it is; names the module or parameter."""


class StoreError(ZOError):
    """Weights that could not be placed, moved or read."""


class CodecError(ZOError):
    """A wire format that cannot hold what it was given."""


class JournalError(ZOError):
    """A journal that is damaged, locked, or belongs to another run."""


class CheckpointError(ZOError):
    """A checkpoint that is damaged, belongs to another run, or cannot be written."""


class ReplicaError(ZOError):
    """Ranks that do not agree, or cannot be reached."""


class LostRankError(ReplicaError):
    """A rank that ended, or cannot be reached any more; all others stop, and each says which."""


class DivergedError(ZOError):
    """Losses that are no finite numbers, or go where they should not."""


class RolledBackError(DivergedError):
    """The journal stands where all was well; a new engine on it goes on from there.

    This one's weights are ahead of the journal, and it takes no further step.

    Attributes:
        text: What was found and done.
    """

    def __init__(self, text: str) -> None:
        super().__init__(f"{text}; make a new engine on this journal, which goes on from there")
        self.text = text


class KernelError(ZOError):
    """The native kernels were not built, or were asked for what they do not do."""
