"""Errors that end a run, and the record of a video that could not be decoded."""

from __future__ import annotations

from dataclasses import dataclass

from posmlp.errors import UserError


class RunError(UserError):
    """A run cannot start or cannot continue. The message is for the user."""


class AgreedError(RunError):
    """An error that all training workers raise at the same step, so that none waits for another."""


class SignalInterrupt(KeyboardInterrupt):
    """A signal interrupts the command.

    Attributes:
        signum: number of the signal.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class StoppedError(SignalInterrupt):
    """A signal or the study asked the run to stop, and the run has saved a checkpoint.

    Attributes:
        signum: number of the signal; SIGTERM if the study asked.
    """


@dataclass(frozen=True)
class BadVideo:
    """A video that could not be decoded.

    Attributes:
        sample_id: the video's id in the manifest.
        uri: where its file is.
        reason: the error of the decoder, as one line.
    """

    sample_id: str
    uri: str
    reason: str
