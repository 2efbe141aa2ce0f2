"""Videos made by the tests: every frame says its number, so that the right frame is known without a decoder's word."""

from fractions import Fraction

import av
import numpy as np

BITS = 9  # frame numbers below 512


def picture(number, width, height):
    """A frame that says its number: nine vertical bars, white for a set bit; the last quarter tells top from bottom."""
    frame = np.full((height, width, 3), 40, np.uint8)
    for bit, columns in enumerate(np.array_split(np.arange(width), BITS)):
        frame[:, columns] = 220 if number >> bit & 1 else 30
    frame[height * 3 // 4 :] = (200, 60, 40)
    return frame


def number(frame):
    """The number that a decoded frame says."""
    height, width = frame.shape[:2]
    places = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum(1 << bit for bit, x in enumerate(places) if frame[height // 3, x].mean() > 125)


def numbers(frames):
    return [number(frame) for frame in frames]


def noisy(frame):
    """Noise makes the frames most of the file, so that damage hits them and not the header."""
    return np.where(np.random.default_rng(0).random(frame.shape) < 0.5, frame, frame // 2 + 60).astype(np.uint8)


def write_video(
    path,
    width=108,
    height=72,
    count=40,
    codec="libx264",
    options=None,
    *,
    change=lambda frame: frame,
    muxer=None,
    form=None,
    pix_fmt="yuv420p",
    rate=10,
    times=None,
    prepare=lambda stream: None,
):
    """Write frames 0 to ``count`` - 1; ``times`` are their times of presentation in thousandths of a second."""
    options = {"threads": "1"} | ({"preset": "ultrafast"} if codec == "libx264" else {}) | (options or {})
    with av.open(str(path), "w", format=form, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        prepare(stream)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(change(picture(i, width, height)), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def by_pyav(path, video=0):
    """All frames of a video stream by plain sequential decoding: uint8 [T, H, W, 3]."""
    with av.open(f"file:{path}") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=video)])


def scramble(path):
    """Noise from the middle of the file on; the index stands at the front and stays whole."""
    write_video(path, change=noisy, muxer={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = np.random.default_rng(0).bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    return str(path)
