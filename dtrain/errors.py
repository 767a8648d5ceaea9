"""The errors that a user can meet. A message names the key, the value, the reason and the way out.

`raise` one of these for what the user did; `assert` for what we did.
"""

from __future__ import annotations

from collections.abc import Iterable


class DtrainError(Exception):
    """Base of all of them; `exit_code` is what `dtrain` exits with."""

    exit_code = 3
    kind = "worker"


class UserError(DtrainError):
    """The input is wrong; nothing was started."""

    exit_code = 2
    kind = "user"

    @classmethod
    def of(cls, problems: Iterable[str]) -> UserError:
        """One error that shows every problem, a line each."""
        return cls("\n".join(problems))


class ConfigError(UserError):
    """A key, a value or a choice that the configuration does not have."""


class PlanError(UserError):
    """Values that are each fine and do not fit together, or do not fit the machine."""


class ModelError(UserError):
    """A model or tokenizer that is not there or cannot be used."""


class DataError(UserError):
    """Rows that are missing, empty or unreadable."""


class RunError(UserError):
    """A run folder that is in use, unreadable or not writable."""


class ExportError(UserError):
    """An export that is not there or does not match."""


class CheckpointError(UserError):
    """A checkpoint that is not there, not whole, or of another run."""


class StorageError(DtrainError):
    """A checkpoint could not be written."""

    kind = "storage"


class DivergedError(DtrainError):
    """Ranks that are to hold the same values do not."""


class LeapError(DtrainError):
    """A loss far above those before it, found before the update."""

    kind = "leap"


class NonFiniteError(DtrainError):
    """A loss or gradient that is not a number, found before the update."""

    kind = "nonfinite"
