"""The base class of errors that wrong input causes, and the record of a video that cannot be decoded."""

from __future__ import annotations

from dataclasses import dataclass


class UserError(ValueError):
    """Input from the user that cannot be used.

    The message names the file, key or value, says what was expected and what to do. The command line prints it alone,
    without a traceback.
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
