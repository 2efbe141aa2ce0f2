"""Decoding in a child process: a video that crashes FFmpeg, hangs it or never ends makes only itself fail.

Each process that decodes has one child process. It starts with the first video, and again after it had to be killed.
Pixels are returned through shared memory, without a copy.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from posmlp import storage
from posmlp.errors import UserError
from posmlp.processes import shielded_children
from posmlp.video.decode import (
    TOO_LARGE,
    DecodeError,
    Decoder,
    Frames,
    ImageFolder,
    Shown,
    Span,
    Video,
    VideoInfo,
    VideoPart,
    open_video,
)

MEMORY_LIMIT = 6 * 2**30  # bytes of a child's address space; an 8K stream takes about 3
FRAMES_LIMIT = 2 * 2**30  # bytes of frames it may return: they are in shared memory, which MEMORY_LIMIT does not count
START_TIMEOUT_S = 60.0

_child: DecodingProcess | None = None


@contextlib.contextmanager
def open_isolated(
    uri: str, images: int | None = None, decoder: Decoder = "pyav", *, timeout_s: float, span: Span | None = None
) -> Iterator[IsolatedVideo]:
    """Open a video in the child process (``posmlp.video.decode.open_video``), and close it at the end of the ``with``.

    Args:
        uri, images, decoder, span: as of ``open_video``.
        timeout_s: limit in seconds for all work on this video together.

    Raises:
        DecodeError: the video cannot be read, crashes the decoder, or takes longer than ``timeout_s``. Every method of
            the returned video may raise it too.
    """
    video = IsolatedVideo(uri, images, decoder, timeout_s, span)
    try:
        yield video
    finally:
        video.close()


def call_isolated(uri: str, function: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
    """Call ``function(*args)`` in the child process.

    Args:
        uri: the video that an error names.
        function: a function at the top level of a module.
        timeout_s: limit in seconds.

    Raises:
        DecodeError: it takes too long, or the process dies.
    """
    return decoding_process().call(uri, "call", (function, *args), time.monotonic() + timeout_s, timeout_s)


class IsolatedVideo:
    """A video that is open in the child process; see ``posmlp.video.decode.Video``.

    Attributes:
        info: properties of the video.
    """

    def __init__(
        self, uri: str, images: int | None, decoder: Decoder, timeout_s: float, span: Span | None = None
    ) -> None:
        self._uri, self._images, self._timeout_s, self._span = uri, images, timeout_s, span
        try:
            self._open(decoder)
        except DecodeError:
            if decoder == "pyav":
                raise
            self._open("pyav")  # decord may crash or hang where PyAV does not

    def _open(self, decoder: Decoder) -> None:
        self._process = decoding_process()
        self._deadline = time.monotonic() + self._timeout_s
        self.info: VideoInfo = self._call("open", self._uri, self._images, decoder, self._span)

    def read(self, indices: Sequence[int], short_side: int | None = None) -> Frames:
        """Read frames by number: uint8 ``[len(indices), H, W, 3]``.

        They lie in shared memory and are valid until the child's next video.
        """
        try:
            shape, self.info = self._call("read", indices, short_side)
        except DecodeError:
            if self.info.decoder == "pyav":
                raise
            self._open("pyav")
            shape, self.info = self._call("read", indices, short_side)
        return self._process.pixels(shape)

    def verify(self) -> tuple[int, int]:
        """Decode every frame. Returns the height and width in pixels, upright."""
        return self.inspect()[:2]

    def inspect(self) -> Shown:
        """Decode every frame, as ``verify``. Returns also the orientation."""
        shown: Shown = self._call("inspect")
        return shown

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function(video, *args)`` in the child.

        The function must be at the top level of a module. Arguments and result must pickle.
        """
        return self._call("run", function, *args)

    def close(self) -> None:
        """Close the video in the child."""
        if self._process.alive():
            with contextlib.suppress(DecodeError):
                self._call("close")

    def _call(self, command: str, *args: Any) -> Any:
        return self._process.call(self._uri, command, args, self._deadline, self._timeout_s)


class DecodingProcess:
    """The child process, a channel to it, and memory shared with it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.memory = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open while the child lives
        self.map: mmap.mmap | None = None
        ours, theirs = socket.socketpair()
        code = f"from posmlp.video.isolated import serve; serve({theirs.fileno()}, {self.memory.fileno()})"
        command = [sys.executable, "-P", "-c", code]
        with shielded_children():
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self.memory.fileno()),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        theirs.close()
        self.channel = Connection(ours.detach())
        try:
            ready = self.channel.poll(START_TIMEOUT_S) and self.channel.recv() == "ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.kill()
            raise UserError(f"the decoding process does not start on {socket.gethostname()}: {' '.join(command)}")

    def alive(self) -> bool:
        """Return whether the process still runs."""
        return self.process.poll() is None

    def call(self, uri: str, command: str, args: tuple[Any, ...], deadline: float, timeout_s: float) -> Any:
        """Run one command; kill the process if it does not answer in time."""
        remaining = deadline - time.monotonic()
        try:
            self.channel.send((max(remaining, 0.0), command, args))
            if remaining <= 0 or not self.channel.poll(remaining):
                self.kill()
                raise DecodeError(
                    uri,
                    f"not decoded within {timeout_s:g} s; raise the limit (data.decode_timeout_s, --timeout), or "
                    "remove the video",
                )
            failed, answer = self.channel.recv()
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # to get its exit code
            self.kill()
            code = self.process.returncode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise DecodeError(uri, f"it crashes the decoder ({how}); re-encode it, or remove it") from error
        if failed:
            raise answer
        return answer

    def pixels(self, shape: tuple[int, ...]) -> Frames:
        """The pixels that the child has written to shared memory."""
        size = int(np.prod(shape))
        if self.map is None or len(self.map) < size:
            self.map = mmap.mmap(self.memory.fileno(), os.fstat(self.memory.fileno()).st_size)
        return np.frombuffer(self.map, np.uint8, size).reshape(shape)

    def kill(self) -> None:
        """Kill the process and release its memory."""
        self.map = None
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a dead disk cannot be killed
            self.process.wait(5)
        self.channel.close()
        self.memory.close()


def decoding_process() -> DecodingProcess:
    """The child of this process, started if there is none."""
    global _child
    if _child is None or _child.owner != os.getpid() or not _child.alive():  # after a fork, _child is the parent's
        _child = DecodingProcess()
    return _child


@atexit.register
def _kill_at_exit() -> None:
    if _child is not None and _child.owner == os.getpid():
        _child.kill()


# --- in the child --------------------------------------------------------------------------------------------------


def serve(channel_fd: int, memory_fd: int) -> None:
    """Run the parent's commands until the parent is gone."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # core dumps of crashes would fill the disk
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # if memory still runs out, the kernel kills this process first
    channel = Connection(channel_fd)
    commands = _Commands(memory_fd)
    channel.send("ready")
    while True:
        try:
            seconds, command, args = channel.recv()
        except EOFError:
            os._exit(0)
        # If the parent dies, nothing else would kill this process when it hangs, so the alarm does.
        signal.setitimer(signal.ITIMER_REAL, seconds + 5)
        try:
            answer = False, commands.run_command(command, args)
        except (DecodeError, UserError) as error:
            answer = True, error
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            channel.send(answer)
        except OSError:
            os._exit(0)


class _Commands:
    """The commands that the parent can send, one method each."""

    def __init__(self, memory_fd: int) -> None:
        self.memory_fd = memory_fd
        self.map: mmap.mmap | None = None
        self.uri = ""
        self.whole: Video | VideoPart | ImageFolder | None = None  # what is open, and stays so for parts of it
        self.video: Video | VideoPart | ImageFolder | None = None  # what is read
        self.file: tuple[Any, ...] | None = None  # which file is open, if it may be read again

    def run_command(self, command: str, args: tuple[Any, ...]) -> Any:
        """Run one command. Any other error, in a decoder or out of memory, becomes a DecodeError of the video."""
        try:
            return getattr(self, command)(*args)
        except (DecodeError, UserError):
            self.file = None  # opened again for the next row
            raise
        except MemoryError as error:
            self.file = None
            raise DecodeError(self.uri, TOO_LARGE) from error
        except Exception as error:
            self.file = None
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            reason = f"the decoder fails ({cause}); re-encode the video, or remove it"
            raise DecodeError(self.uri, reason) from error

    def open(self, uri: str, images: int | None, decoder: Decoder, span: Span | None) -> VideoInfo:
        """Open a video. The last file stays open: rows of a long film follow each other, and its index is slow."""
        self.uri = uri
        file = (uri, decoder, *version) if images is None and (version := file_version(uri)) else None
        if file is None or file != self.file:
            self.forget()
            self.whole = open_video(uri, images, decoder, None if images is None else span)
            self.file = file
        self.video = VideoPart(self.whole, span) if span and isinstance(self.whole, Video) else self.whole
        return self.opened().info

    def read(self, indices: Sequence[int], short_side: int | None) -> tuple[tuple[int, ...], VideoInfo]:
        return self.opened().read(indices, short_side, self.allocate).shape, self.opened().info

    def inspect(self) -> Shown:
        return self.opened().inspect()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.opened(), *args)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def close(self) -> None:
        if self.file is None:
            self.forget()

    def opened(self) -> Video | VideoPart | ImageFolder:
        assert self.video is not None
        return self.video

    def forget(self) -> None:
        """Close what is open."""
        if self.whole is not None:
            self.whole.close()
        self.whole = self.video = self.file = None

    def allocate(self, shape: tuple[int, ...]) -> Frames:
        size = math.prod(shape)
        if size > FRAMES_LIMIT:
            raise DecodeError(
                self.uri, f"its frames take {size / 1e9:.1f} GB; lower data.short_side or the views, or remove it"
            )
        if self.map is None or len(self.map) < size:
            try:  # allocate now: writing to a file that was only made longer kills the process when memory is full
                getattr(os, "posix_fallocate", lambda fd, _, size: os.ftruncate(fd, size))(self.memory_fd, 0, size)
            except OSError as error:
                raise UserError(
                    f"no room for {size / 1e6:.0f} MB of decoded frames in shared memory ({error.strerror}); give the "
                    "machine more (docker: --shm-size), or lower data.short_side"
                ) from error
            self.map = mmap.mmap(self.memory_fd, size)
        return np.frombuffer(self.map, np.uint8, size).reshape(shape)


def file_version(uri: str) -> tuple[int, ...] | None:
    """What tells a local file from another one of its name; None for an object or a row of a Parquet file."""
    if storage.is_remote(uri) or storage.parquet_row(uri):
        return None
    try:
        found = os.stat(storage.local_path(uri))
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
