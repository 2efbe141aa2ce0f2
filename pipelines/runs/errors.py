"""Errors of a run, and the record of a video that could not be decoded."""

from __future__ import annotations

from dataclasses import dataclass

from posmlp.errors import UserError


class RunError(UserError):
    """A run that cannot start or go on; the message is for the user."""


class AgreedError(RunError):
    """An error that all workers raise together, so that none waits for another."""


class StoppedError(KeyboardInterrupt):
    """A run that was asked to stop by a signal, or by its study, and has saved its state."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@dataclass(frozen=True)
class BadVideo:
    """A video that could not be decoded."""

    sample_id: str
    uri: str
    reason: str
