"""What the code logs, as a list of lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("pipelines", "posmlp")


class ListHandler(logging.Handler):
    """Append the message of each record to a list."""

    def __init__(self, lines: list[str], level: int):
        super().__init__(level)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def log_lines(level: int = logging.INFO) -> Iterator[list[str]]:
    """Yield a list that collects the messages of the loggers "pipelines" and "posmlp" and of those below them.

    The list stays usable after the block. The level of both loggers is restored at the end.

    Args:
        level: the lowest level that is collected.
    """
    lines: list[str] = []
    handler = ListHandler(lines, level)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield lines
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old)
