"""Every error a user can cause, and nothing else.

PlaitError
├── ConfigError        a value in config/ is wrong
├── LayoutError        a path does not follow the artifact layout
├── RecordError        one line of one input file is wrong (counted, never fatal by itself)
│   └── LeftOut        one that is not wrong, and that a rule leaves out (counted apart)
├── DataError          a data artifact is not what it should be
├── CheckpointError    a checkpoint does not hold what its name says
├── ProofError         an artifact failed its proof
└── Stopped            a job was asked to stop and did, with all it had done

A message says what was found, where, and what is expected; ``hint`` says what to do. The command
line prints both and exits with status 2; after Stopped with 75, "try again". Anything else that is
raised is a bug and keeps its traceback.
"""

import os


class PlaitError(Exception):
    """A mistake that the reader of the message can correct."""

    status = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        """Keep the sentence and the advice apart, so that each has its own line."""
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        """One text for frames that print only one."""
        message = super().__str__()
        return f"{message}\nhint:  {self.hint}" if self.hint else message


class ConfigError(PlaitError):
    """A value in config/ is wrong."""


class LayoutError(PlaitError):
    """A path does not follow the artifact layout."""


class RecordError(PlaitError):
    """One line of one input file is wrong; ``reason`` is the short code that ledgers count by."""

    def __init__(self, message: str, *, reason: str = "", hint: str = "") -> None:
        """Keep the code apart from the sentence."""
        super().__init__(message, hint=hint)
        self.reason = reason


class LeftOut(RecordError):  # noqa: N818 - nothing is wrong
    """One line of one input file that a rule of the config leaves out; ``reason`` names the rule."""


class DataError(PlaitError):
    """A data artifact is not what it should be."""


class CheckpointError(PlaitError):
    """A checkpoint does not hold what its name says."""


class ProofError(PlaitError):
    """An artifact failed its proof."""


class Stopped(PlaitError):  # noqa: N818 - nothing went wrong
    """A job was asked to stop, and did with all it had done; the same command goes on from there."""

    status = os.EX_TEMPFAIL
