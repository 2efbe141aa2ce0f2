"""How a stored picture is turned and mirrored to be shown upright: display matrices of video, EXIF data of pictures.

There are eight such orientations. They are numbered as in EXIF.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import struct
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from numpy.typing import NDArray

# a, b, c, d: the stored pixel (x, y) is shown at (a x + c y, b x + d y), with y downwards.
Matrix = tuple[float, float, float, float]

NAMES = {
    1: "upright",
    2: "mirrored left-right",
    3: "rotated 180",
    4: "mirrored top-bottom",
    5: "transposed",
    6: "rotated 90 clockwise",
    7: "transverse",
    8: "rotated 90 counterclockwise",
}
MATRICES: dict[int, Matrix] = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
# What makes a picture upright: whether to flip it upside down, and how many quarter turns to the left to rotate it
# afterwards.
TURNS = {
    1: (False, 0),
    2: (True, 2),
    3: (False, 2),
    4: (True, 0),
    5: (True, -1),
    6: (False, -1),
    7: (True, 1),
    8: (False, 1),
}
TILT = 0.0175  # the tangent of one degree; FFmpeg's tools do not rotate by less

# Markers of EXIF data in JPEG, PNG and WebP files, and the tag of the orientation.
EXIF_MARKS = (b"Exif\0\0", b"eXIf", b"EXIF")
EXIF = re.compile(rb"(?:Exif\0\0|eXIf|EXIF.{4})(II\*\0|MM\0\*)", re.DOTALL)
EXIF_TAG = 0x0112


class Picture(NamedTuple):
    """A decoded picture as it is stored.

    Attributes:
        frame: the pixels.
        matrix: its display matrix; None if it has none.
    """

    frame: av.VideoFrame
    matrix: Matrix | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels when upright."""
        height, width = self.frame.height, self.frame.width
        return (width, height) if self.on_its_side else (height, width)

    @property
    def on_its_side(self) -> bool:
        """Return whether it is shown with its sides exchanged."""
        return (number_of(self.matrix) or 1) > 4

    @property
    def orientation(self) -> str:
        """The name of its orientation (``NAMES``), or a display matrix that is none of them and is not applied."""
        number = number_of(self.matrix)
        if number is not None:
            return NAMES[number]
        return "other matrix ({:.3g} {:.3g}; {:.3g} {:.3g}), shown as stored".format(*self.matrix or ())

    def turn(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turn its pixels ``[H, W, 3]``, at any scale, upright. Returns a view."""
        upside_down, turns = TURNS[number_of(self.matrix) or 1]
        return np.rot90(rgb[::-1] if upside_down else rgb, turns)


@functools.lru_cache
def number_of(matrix: Matrix | None) -> int | None:
    """The orientation that a display matrix means; None if it is none of the eight. Scale does not count."""
    if matrix is None:
        return 1
    a, b, c, d = matrix
    if abs(b) <= TILT * abs(a) and abs(c) <= TILT * abs(d):
        b = c = 0.0
    elif abs(a) <= TILT * abs(b) and abs(d) <= TILT * abs(c):
        a = d = 0.0
    signs = tuple(float(np.sign(value)) for value in (a, b, c, d))
    return next((number for number, one in MATRICES.items() if one == signs), None)


def display_matrix(frame: av.VideoFrame) -> Matrix | None:
    """The display matrix that FFmpeg gives a frame, from its container, its codec or EXIF data; None without one."""
    # not frame.side_data, because frame and side data would refer to each other, which keeps decoded frames in memory
    found = SideDataContainer.__new__(SideDataContainer)
    with contextlib.suppress(ValueError):  # data of a kind that PyAV does not know end the list
        cast(Any, SideDataContainer).__init__(found, frame)
    with contextlib.suppress(ValueError, IndexError):
        for place in itertools.count():  # PyAV 19 iterates over types, older ones over data
            data = found[place]
            if data.type == SideDataType.DISPLAYMATRIX:
                a, b, _, c, d, *_ = (value / 2**16 for value in struct.unpack("9i", bytes(data)))
                return a, b, c, d
    return None


def exif_matrix(content: bytes) -> Matrix | None:
    """The orientation in a picture file's EXIF data, as a display matrix; None without one, or if they are damaged."""
    offsets = (content.find(mark) for mark in EXIF_MARKS)  # faster than searching for the regular expression
    match = next(filter(None, (EXIF.match(content, offset) for offset in offsets if offset >= 0)), None)
    if not match:
        return None
    tiff, order = content[match.start(1) :], "<" if match[1].startswith(b"I") else ">"
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * entry)
            if tag == EXIF_TAG:
                return MATRICES.get(value)
    except struct.error:  # beyond the end of the file
        pass
    return None
