"""Videos made to do harm: each fails alone, within its limits of memory and time, and reads no other file."""

import contextlib
import http.server
import itertools
import os
import resource
import struct
import threading
import time
import zlib

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.loader import decode_rows
from posmlp.config import load_recipe
from posmlp.video import cache, decode, isolated
from posmlp.video.decode import DecodeError, Video
from posmlp.video.isolated import open_isolated
from posmlp.video.manifest import SCHEMA
from tests.helpers.videos import write_video


def png(path, width, height, rows):
    """A black picture with ``rows`` rows of pixels and any header."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    pixels = b"".join([*(packer.compress(bytes(1 + 3 * width)) for _ in range(rows)), packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return str(path)


def gif(path, width, height):
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF0, 0, 0) + b"\0\0\0\xff\xff\xff"
    path.write_bytes(head + 20 * frame + b";")
    return str(path)


def with_samples(path, count, size=1):
    """An MP4 whose tables claim ``count`` frames of ``size`` bytes; the file stays small."""
    write_video(path, count=4)
    content = bytearray(path.read_bytes())
    place = content.index(b"stsz") + 8
    content[place : place + 8] = struct.pack(">II", size, count)
    for name, values in ((b"stts", (1, count, 512)), (b"stsc", (1, 1, count, 1))):
        place = content.index(name) + 8
        content[place : place + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    path.write_bytes(content)
    return str(path)


def claims_size(path):
    """A video whose stream declares pictures 30000 pixels high and wide."""
    write_video(path, codec="mjpeg", pix_fmt="yuvj420p", count=4)
    content = path.read_bytes()
    start = b"\xff\xc0\x00\x11\x08"
    assert start in content
    path.write_bytes(content.replace(start + struct.pack(">HH", 72, 108), start + struct.pack(">HH", 30000, 30000)))
    return str(path)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Manifest rows (``uri`` and ``frames``), by their defect."""
    folder = tmp_path_factory.mktemp("hostile")
    endless = str(folder / "endless.mp4")
    os.mkfifo(endless)
    return {
        "a picture of 2.7 GB": (png(folder / "a.png", 30000, 30000, 3), 1),
        "a picture that ends early": (png(folder / "b.png", 16000, 16000, 3), 1),
        "a GIF of 65535 x 65535": (gif(folder / "c.gif", 65535, 65535), None),
        "a video of 30000 x 30000": (claims_size(folder / "d.avi"), None),
        "a hundred million frames": (with_samples(folder / "e.mp4", 10**8), None),
        "packets of 2 GB": (with_samples(folder / "f.mp4", 4, 2**31 - 1), None),
        "a file that never answers": (endless, None),
        "an endless file": ("/dev/zero", None),
    }


def test_each_is_one_bad_row_within_its_limits(hostile, tmp_path):
    good = write_video(tmp_path / "good.mp4")
    names = [*hostile, "good"]
    uris, frames = zip(*hostile.values(), (good, None), strict=True)
    rows = {"sample_id": names, "uri": uris, "label": [0] * len(names), "frames": frames}
    config = load_recipe(
        "demo", ["data.decode_timeout_s=5", "data.cache_dir=null", "model.frames=4", "model.image_size=32"]
    )
    children, ours = Peak(), memory("self")["VmHWM"]
    start = time.monotonic()
    with children:
        found = decode_rows(pa.table(rows, schema=SCHEMA), np.ones(len(names), bool), config, 0, False)
    reasons = dict(zip(names, found["reason"], strict=True))
    assert reasons.pop("good") == ""
    assert all(reasons.values()) and len(reasons) == len(hostile), reasons
    assert time.monotonic() - start < 5 + 15
    assert children.peak < isolated.MEMORY_LIMIT
    assert memory("self")["VmHWM"] - ours < 2**28
    assert shared_memory() < 2**28


def shared_memory():
    """Bytes of shared memory that the decoding process has for pixels."""
    return os.fstat(isolated.decoding_process().memory.fileno()).st_blocks * 512


def memory(process):
    """The memory figures of a process in bytes, from Linux, by name."""
    with open(f"/proc/{process}/status") as status:
        lines = (line.split() for line in status if line.startswith("Vm"))
        return {name.rstrip(":"): int(size) * 1024 for name, size, _ in lines}


class Peak:
    """Peak memory of the decoding processes of this process while the block runs."""

    def __init__(self):
        self.peak, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        while not self.over.wait(0.01):
            child = isolated._child
            if child is not None and child.alive():
                with contextlib.suppress(OSError):
                    self.peak = max(self.peak, memory(child.process.pid).get("VmHWM", 0))

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()


def limits(video):
    """The resource limits of the decoding process, from the kernel."""
    with open("/proc/self/oom_score_adj") as score:
        first = int(score.read())
    return first, resource.getrlimit(resource.RLIMIT_AS)[0], resource.getrlimit(resource.RLIMIT_CORE)[0]


def test_the_kernel_knows_the_limits(tmp_path):
    with open_isolated(write_video(tmp_path / "v.mp4"), timeout_s=30) as video:
        assert video.run(limits) == (1000, isolated.MEMORY_LIMIT, 0)


def test_frames_do_not_fill_the_shared_memory(tmp_path):
    """Small files with large pictures are refused before memory is allocated."""
    first = png(tmp_path / "00001.png", 12000, 12000, 12000)
    for number in range(2, 6):
        os.symlink(first, tmp_path / f"{number:05d}.png")
    assert os.path.getsize(first) < 5e6
    with (
        pytest.raises(DecodeError, match=r"its frames take 2\.2 GB; lower data\.short_side"),
        open_isolated(f"{tmp_path}/{{:05d}}.png", 5, timeout_s=60) as video,
    ):
        video.read(range(5))
    assert shared_memory() < 2**28


def test_frames_without_end_do_not_fill_the_cache(tmp_path, monkeypatch):
    video = Video(write_video(tmp_path / "v.mp4"))
    monkeypatch.setattr(cache, "MAX_FILE_BYTES", 40 * 12 * 8 * 3)
    cache.write_cache_file(video, 8, tmp_path / "fits.arrow")
    monkeypatch.setattr(cache, "MAX_FILE_BYTES", 40 * 12 * 8 * 3 - 1)
    with pytest.raises(DecodeError, match="leave out data"):
        cache.write_cache_file(video, 8, tmp_path / "large.arrow")
    assert not (tmp_path / "large.arrow").exists()


def test_too_many_frames_are_not_counted_to_the_end(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4")
    monkeypatch.setattr(decode, "MAX_FRAMES", 40)
    Video(path).close()
    monkeypatch.setattr(decode, "MAX_FRAMES", 39)
    with pytest.raises(DecodeError, match="more than 39 frames"):
        Video(path)


# Other files ----------------------------------------------------------------------------------------------------------


class Ear:
    """A server that records its requests."""

    def __init__(self):
        asked = self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_error(404)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile {}\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT4S" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet><Representation id="1" '
    'mimeType="video/mp4" codecs="avc1" bandwidth="1"><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period>'
    "</MPD>"
)


def test_a_playlist_reads_no_other_file(tmp_path):
    """A file with a video's name, whose content would make FFmpeg open another file or an internal server."""
    (tmp_path / "root").mkdir()
    secret, ear = write_video(tmp_path / "secret.ts"), Ear()
    write_video(tmp_path / "root" / "beside.ts")
    places = [secret, f"file://{secret}", "../secret.ts", "beside.ts", f"{ear.uri}/a.ts"]
    try:
        for text, place, suffix in itertools.product((HLS, CONCAT, DASH), places, ("mp4", "m3u8", "mpd")):
            path = tmp_path / "root" / f"v.{suffix}"
            path.write_text(text.format(place))
            for content in (None, path.read_bytes()):
                with pytest.raises(DecodeError, match="not a video"):
                    Video(str(path), content=content)
    finally:
        ear.server.shutdown()
    assert not ear.asked
