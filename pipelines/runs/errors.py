"""Errors that end a run."""

from __future__ import annotations

from posmlp.errors import BadVideo, UserError

__all__ = ["BadVideo"]


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


class PreemptedError(StoppedError):
    """The machine of the run's driver is about to be taken away, and the run has saved a checkpoint.

    Attributes:
        signum: SIGTERM, with which such a machine ends its processes.
    """
