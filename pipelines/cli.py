"""``posmlp``: the entry point of the command line. The commands are in ``pipelines.commands``."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from pipelines.cluster.signals import exit_code, interrupt_on_signal
from pipelines.commands import data, folds, inference, planning, recipes, runs, training, tuning
from pipelines.commands.options import add_verbosity
from posmlp.errors import UserError

GROUPS = (training, tuning, folds, inference, runs, recipes, data, planning)  # in the order of the help text
LOGGERS = ("pipelines", "posmlp", "tune_spaces")
CLEAR_LINE = "\r\x1b[K"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 failed or refused, 2 wrong usage, 128 + N stopped by signal N (130: Ctrl-C,
        143: SIGTERM).
    """
    args = parse(argv)
    try:
        os.getcwd()
    except FileNotFoundError:  # not even PyTorch can be imported there
        print("posmlp: the current folder does not exist any more; change to another folder", file=sys.stderr)
        return 1
    handlers = start_logging(getattr(args, "log_level", "INFO"))
    with interrupt_on_signal():
        try:
            return args.run(args) or 0
        except KeyboardInterrupt as stop:
            handlers[0].end_live_line()
            print(f"\ninterrupted; {args.after_interrupt}", file=sys.stderr)
            return exit_code(stop)
        except (UserError, OSError) as error:  # OSError: a disk or a store that does not answer
            handlers[0].end_live_line()
            print(f"posmlp: {error}", file=sys.stderr)
            return 1
        finally:
            stop_logging(handlers)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with exit code 2."""
    top = make_parser()
    args, rest = top.parse_known_args(argv)
    if rest and ("overrides" not in args or any(item.startswith("-") or "=" not in item for item in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes positional arguments only in one piece; these overrides stand behind an option
        args.overrides += rest
    return args


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="posmlp", description="Train and search PosMLP-Video, a video backbone.")
    top.add_argument("--version", action=PrintVersion)
    add_verbosity(top)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return top


class PrintVersion(argparse.Action):
    """``--version``: print the version and end. It is looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str):
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        import posmlp

        print(f"posmlp {posmlp.__version__}")
        parser.exit()


# --- logging -----------------------------------------------------------------------------------------------------


class LineHandler(logging.StreamHandler[TextIO]):
    """Print log records as lines. On a terminal a record with ``live=True`` is replaced by the next one.

    Args:
        other: a handler that writes to the same terminal; its live line ends before this handler writes.
    """

    def __init__(self, stream: TextIO, other: LineHandler | None = None):
        super().__init__(stream)
        self.other, self.is_live = other, False

    def emit(self, record: logging.LogRecord) -> None:
        if self.other:
            self.other.end_live_line()
        if not self.stream.isatty():
            super().emit(record)
            return
        text, clear = self.format(record), CLEAR_LINE if self.is_live else ""
        self.is_live = getattr(record, "live", False)
        if self.is_live:
            self.stream.write(f"{clear}{text[: shutil.get_terminal_size().columns - 1]}")
        else:
            self.stream.write(f"{clear}{text}\n")
        self.flush()

    def end_live_line(self) -> None:
        """Keep the live line, if there is one."""
        if self.is_live:
            self.stream.write("\n")
            self.flush()
            self.is_live = False


class MaxLevel(logging.Filter):
    """Pass records below WARNING: those at and above it go to stderr."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING


def start_logging(level: str) -> list[LineHandler]:
    """Send progress to stdout and warnings to stderr; returns the handlers, for ``stop_logging``.

    Args:
        level: the lowest level that is printed. At DEBUG each line has its time and module.
    """
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s" if level == "DEBUG" else "%(message)s"
    progress = LineHandler(sys.stdout)
    warnings = LineHandler(sys.stderr, progress)
    progress.addFilter(MaxLevel())
    warnings.setLevel(logging.WARNING)
    for handler in (progress, warnings):
        handler.setFormatter(logging.Formatter(text))
        for name in LOGGERS:
            logging.getLogger(name).addHandler(handler)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = False  # else a root handler of a library would print each line again
    return [progress, warnings]


def stop_logging(handlers: Sequence[logging.Handler]) -> None:
    """Undo ``start_logging``, for a process that runs several commands."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for handler in handlers:
            logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


if __name__ == "__main__":
    sys.exit(main())
