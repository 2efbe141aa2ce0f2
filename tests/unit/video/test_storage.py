"""Local and remote files: odd names, rows of Parquet files, and a real S3 server."""

import contextlib
import io
import os
import signal
import socket
import string
import subprocess
import sys
import time
import uuid

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posmlp import storage
from posmlp.video.decode import DecodeError, Video
from posmlp.video.isolated import open_isolated
from posmlp.video.manifest import ManifestError, read_manifest
from tests.helpers.videos import numbers, write_video

ODD_NAMES = [
    "works?.mp4",
    "a#b.mp4",
    "a#7",
    " blanks .mp4",
    "a%20b.mp4",
    "a:b.mp4",
    "a=b&c=d.mp4",
    "what?x=1&y=2.mp4",
    "watch?v=abc",
    "é 漢.mp4",
    "-v.mp4",
    "'so'.mp4",
    'a"b.mp4',
    "a\\b.mp4",
    "{:05d}.jpg",
    "100%.mp4",
    "~.mp4",
    "v.mp4.gz",
    "v.parquet",
    "a.parquet#x",
]

# Names and places -----------------------------------------------------------------------------------------------------

NAME = st.text(string.ascii_letters + string.digits + " _-+.#%&='~éß漢", min_size=1, max_size=12).filter(
    lambda name: name.strip(".") and name == name.strip()
)
FOLDER = st.lists(NAME, min_size=1, max_size=4).map("/".join)


@given(st.sampled_from(["/", "s3://bucket/", "gs://b/", "memory://", "hdfs://host:9000/"]), FOLDER, FOLDER)
def test_parent_undoes_join(root, folder, name):
    base = root + folder
    joined = storage.join(base, name)
    assert joined == f"{base}/{name}"
    assert storage.parent(joined) == f"{base}/{name}".rpartition("/")[0]
    assert storage.join(base + "/", name) == joined
    assert storage.is_remote(joined) == (root != "/")


@pytest.mark.parametrize(
    "options", ["?region=eu-west-1", "?scheme=http", "?endpoint_override=h:1&scheme=http", "?user=me", "?tenant_id=7"]
)
def test_the_options_of_a_store_are_recognised(options):
    assert storage.OPTIONS.split("s3://bucket/a?v=1.mp4" + options) == ["s3://bucket/a?v=1.mp4", options[1:]]


@given(FOLDER, NAME)
def test_a_stores_options_stay_behind_the_path(folder, name):
    options = "?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1"
    joined = storage.join(f"s3://bucket/{folder}{options}", name)
    assert joined == f"s3://bucket/{folder}/{name}{options}"
    assert storage.parent(joined) == f"s3://bucket/{folder}{options}"


@given(FOLDER, FOLDER)
def test_an_absolute_path_or_a_uri_stays_as_it_is(base, path):
    assert storage.join("/" + base, "/" + path) == "/" + path
    assert storage.join("/" + base, "s3://" + path) == "s3://" + path
    assert storage.join("s3://" + base, "gs://" + path) == "gs://" + path
    assert storage.join("s3://" + base, "/" + path) == "/" + path
    assert storage.join("s3://" + base, "file:///" + path) == "/" + path
    assert storage.join("file:///" + base, path) == f"/{base}/{path}"


def test_local_paths_are_made_absolute_and_plain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.join("a", "b.mp4") == f"{tmp_path}/a/b.mp4"
    assert storage.join("/a/b", "../c.mp4") == "/a/c.mp4"
    assert storage.join("file:///a", "./b.mp4") == "/a/b.mp4"
    assert storage.parent("b.mp4") == str(tmp_path)
    assert storage.parent("file:///a/b.mp4") == "/a"
    assert storage.local_path("file:///a/../b.mp4") == "/b.mp4"


def test_a_relative_path_needs_the_current_folder(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(storage.StorageError, match=r"runs/a is a relative path, and the current folder does not exist"):
        storage.join("runs", "a")
    assert storage.join("/runs", "a") == "/runs/a"


@given(NAME, st.integers(0, 10**9))
def test_a_row_of_a_parquet_file(name, row):
    for folder in ("/a b/", "s3://bucket/x/", ""):
        assert storage.parquet_row(f"{folder}{name}.parquet#{row}") == (f"{folder}{name}.parquet", row)


@pytest.mark.parametrize("uri", ["a.parquet", "a.parquet#", "a.parquet#x", "a.parquet#-1", "a#7", ".parquet#1"])
def test_a_uri_that_is_no_row_of_a_parquet_file(uri):
    assert storage.parquet_row(uri) is None


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_local_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for uri in (name, f"{tmp_path}/{name}", f"file://{tmp_path}/{name}", f"folder ?#/{name}"):
        assert not storage.is_remote(uri)
        content = uri.encode()
        storage.write_bytes(uri, content)
        assert storage.read_bytes(uri) == content
        assert storage.are_files([uri, uri + "x"]) == [True, False]
        assert storage.version(uri) == f"{len(content)}|{os.stat(storage.local_path(uri)).st_mtime_ns}"
    assert sorted(os.listdir(tmp_path)) == sorted([name, "folder ?#"])


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_objects_of_a_store(name):
    bucket = f"memory://{uuid.uuid4().hex}"
    uri = storage.join(bucket, name)
    storage.write_bytes(uri, b"content")
    assert storage.read_bytes(uri) == b"content"
    assert storage.are_files([uri, uri + "x", bucket]) == [True, False, False]
    assert [path.rpartition("/")[2] for path in fsspec.filesystem("memory").ls(bucket, detail=False)] == [name]


def test_of_many_files_each_is_looked_for(tmp_path):
    """More files than one thread checks at a time, some in a store and some named twice."""
    bucket = f"memory://{uuid.uuid4().hex}"
    names = [f"{number}.mp4" for number in range(3 * storage.LOCAL_CHECKS_PER_TASK + 5)]
    there = [number % 3 > 0 for number in range(len(names))]
    uris = [f"file://{tmp_path / name}" if number % 2 else str(tmp_path / name) for number, name in enumerate(names)]
    for uri, exists in zip(uris, there, strict=True):
        if exists:
            storage.write_bytes(uri, b"")
    storage.write_bytes(f"{bucket}/a.mp4", b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.mp4").symlink_to("1.mp4")
    odd = {f"{bucket}/a.mp4": True, f"{bucket}/b.mp4": False, str(tmp_path / "folder"): False}
    odd |= {str(tmp_path / "link.mp4"): True, f"{tmp_path}/1.mp4#3": False}
    asked = [*odd, *uris, *uris[::-1], *odd]
    assert storage.are_files(asked) == [*odd.values(), *there, *there[::-1], *odd.values()]
    assert storage.are_files([]) == []


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "folder" / "v.mp4"
    storage.write_bytes(str(path), b"old")
    storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"new"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(str(path), b"never seen")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["v.mp4"]


@pytest.mark.parametrize("place", ["local", "memory", "s3"])
def test_a_file_written_in_pieces_appears_whole_or_not_at_all(tmp_path, request, place):
    folder = {"local": str(tmp_path), "memory": f"memory://{uuid.uuid4().hex}", "s3": f"s3://videos/{uuid.uuid4().hex}"}
    if place == "s3":
        request.getfixturevalue("s3")
    uri, pieces = f"{folder[place]}/new/a.bin", [os.urandom(3 * 2**20) for _ in range(5)]
    with pytest.raises(KeyboardInterrupt), storage.output_stream(uri) as file:
        file.write(pieces[0])
        raise KeyboardInterrupt
    assert storage.are_files([uri]) == [False]
    with storage.output_stream(uri) as file:
        for piece in pieces:
            file.write(piece)
            assert place == "memory" or storage.are_files([uri]) == [False]  # fsspec's files in memory appear at once
    storage.copy_file(uri, f"{folder[place]}/copy/b.bin")
    for each in (uri, f"{folder[place]}/copy/b.bin"):
        assert storage.read_bytes(each) == b"".join(pieces)
        assert storage.file_size(each) == 15 * 2**20
    if place == "local":
        assert {file.name for file in tmp_path.rglob("*.*")} == {"a.bin", "b.bin"}


def test_a_killed_process_leaves_no_file_of_the_name(tmp_path):
    code = """if True:
        import os, signal, sys
        from posmlp import storage
        with storage.output_stream(sys.argv[1]) as file:
            file.write(bytes(2**20))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.bin")], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("a.bin.") and left.suffix == ".tmp"


def test_a_file_that_changes_has_another_version(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"one")
    first = storage.version(str(path))
    assert storage.version(str(path)) == first
    os.utime(path, ns=(0, 5))
    second = storage.version(str(path))
    path.write_bytes(b"longer")
    os.utime(path, ns=(0, 5))
    assert len({first, second, storage.version(str(path))}) == 3


@pytest.mark.parametrize("uri", ["gone.mp4", "memory://nowhere/v.mp4"])
def test_a_missing_file_is_an_error(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    with pytest.raises(FileNotFoundError):
        storage.version(uri)
    assert storage.are_files([uri]) == [False]


@pytest.mark.parametrize("uri", ["nothing://bucket/v.mp4", "s3a+b://x/y", "s3://bucket/v.mp4?no_such_option=1"])
def test_a_uri_that_nothing_opens_is_the_users_error(uri):
    with pytest.raises(storage.StorageError, match="no file system for it"):
        storage.read_bytes(uri)


# Parquet --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("group", [1, 3, 100])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_each_row_is_read_over_all_row_groups(tmp_path, place, group, kind):
    rows = [bytes([i]) * (i * 37 % 100) for i in range(10)]
    folder = str(tmp_path) if place == "local" else f"memory://{uuid.uuid4().hex}"
    file = io.BytesIO()
    table = pa.table({"label": list(range(10)), "data": pa.array(rows, kind)})
    pq.write_table(table, file, row_group_size=group)
    storage.write_bytes(f"{folder}/v.parquet", file.getvalue())
    for i in (*range(10), 9, 0):
        assert storage.read_bytes(f"{folder}/v.parquet#{i}") == rows[i]
    with pytest.raises(OSError, match="has 10 rows, no row 10"):
        storage.read_bytes(f"{folder}/v.parquet#10")
    assert storage.are_files([f"{folder}/v.parquet#3", f"{folder}/w.parquet#3"]) == [True, False]


def test_a_replaced_parquet_file_is_read_again(tmp_path):
    path = tmp_path / "v.parquet"
    for content in (b"one", b"another"):
        pq.write_table(pa.table({"data": [content]}), path)
        assert storage.read_bytes(f"{path}#0") == content


def whole_parquet():
    file = io.BytesIO()
    pq.write_table(pa.table({"data": [np.random.default_rng(0).bytes(20000)]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: pq.write_table(pa.table({"video": [b"a"]}), path), "has no column 'data'"),
        (lambda path: path.write_bytes(b"PAR1" + bytes(500) + b"PAR1"), "cannot be read as a Parquet file"),
        (lambda path: path.write_text("text\n" * 50), "cannot be read as a Parquet file"),
        (lambda path: path.write_bytes(whole_parquet()[:-300]), "cannot be read as a Parquet file"),
        (lambda path: path.write_bytes(b"PAR1" + bytes(5000) + whole_parquet()[5004:]), "row 0 of .* cannot be read"),
        (lambda path: path.touch(), "cannot be read as a Parquet file"),
        (lambda path: path.mkdir(), "v.parquet"),
        (lambda path: None, "v.parquet"),
        (
            lambda path: pq.write_table(pa.table({"data": pa.array([None], pa.binary())}), path),
            "row 0 of .* holds no bytes",
        ),
        (lambda path: pq.write_table(pa.table({"data": [1]}), path), "row 0 of .* holds no bytes"),
    ],
)
def test_the_error_of_a_bad_parquet_file_names_the_defect(tmp_path, make, words):
    path = tmp_path / "v.parquet"
    make(path)
    with pytest.raises(OSError, match=words):
        storage.read_bytes(f"{path}#0")
    with pytest.raises(DecodeError) as caught:
        Video(f"{path}#0")
    assert "\n" not in str(caught.value)
    assert "Errno" not in str(caught.value)


# An S3 server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(s3, tmp_path_factory):
    """Local videos that are also in the bucket."""
    folder = tmp_path_factory.mktemp("clips")
    for name, codec in [("a.mp4", "libx264"), ("b c.mkv", "libx264"), ("works?.avi", "mpeg4"), ("d#1.webm", "libvpx")]:
        path = write_video(folder / name, codec=codec, options={"g": "12", "bf": "2"} if codec != "libvpx" else {})
        storage.write_bytes(f"s3://videos/set/{name}", (folder / name).read_bytes())
        assert storage.read_bytes(f"s3://videos/set/{name}") == (folder / name).read_bytes()
        assert path
    return folder


def open_paths(video):
    """The files that the child has open, except for shared memory and output."""
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if number <= 2:
                continue
            path = os.readlink(f"/proc/self/fd/{number}")
            if os.path.isfile(path) or ("(deleted)" in path and not path.startswith("/dev/shm")):
                found.add(path)
    return found


@pytest.mark.parametrize("options", ["", "?endpoint_override={}&scheme=http&region=us-east-1"])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_videos_on_s3_decode_as_local_ones(s3, clips, options, decoder):
    for path in sorted(clips.iterdir()):
        uri = f"s3://videos/set/{path.name}" + options.format(s3)
        with open_isolated(uri, decoder=decoder, timeout_s=60) as video:
            here = Video(str(path), decoder)
            assert (video.info.frames, video.info.decoder) == (here.info.frames, here.info.decoder)
            frames = video.read([3, 17, 39], 40)
            np.testing.assert_array_equal(frames, here.read([3, 17, 39], 40))
            assert numbers(frames) == [3, 17, 39]
            if os.path.isdir("/proc/self/fd") and os.path.isdir("/dev/shm"):
                files = video.run(open_paths)
                assert not [file for file in files if not file.startswith(("/usr", "/etc", "/dev"))], files


def test_a_parquet_file_on_s3(clips):
    content = (clips / "a.mp4").read_bytes()
    file = io.BytesIO()
    pq.write_table(pa.table({"data": [b"no video", content, content]}), file, row_group_size=2)
    storage.write_bytes("s3://videos/set.parquet", file.getvalue())
    with open_isolated("s3://videos/set.parquet#2", timeout_s=60) as video:
        assert numbers(video.read([5, 30])) == [5, 30]
    with pytest.raises(DecodeError, match="not a video"), open_isolated("s3://videos/set.parquet#0", timeout_s=60):
        pass


def test_the_error_of_a_list_on_s3_names_the_missing_video(clips):
    names = sorted(path.name for path in clips.iterdir())
    lines = [f'"{name}",{i % 2}' for i, name in enumerate(names)]
    storage.write_bytes("s3://videos/set/good.csv", "\n".join(["path,label", *lines]).encode())
    manifest = read_manifest("s3://videos/set/good.csv")
    assert manifest.rows["uri"].to_pylist() == [f"s3://videos/set/{name}" for name in names]
    storage.write_bytes("s3://videos/set/bad.csv", "\n".join(["path,label", *lines, "gone.mp4,1"]).encode())
    with pytest.raises(ManifestError) as caught:
        read_manifest("s3://videos/set/bad.csv")
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("s3://videos/set/bad.csv:6: no video file s3://videos/set/gone.mp4")


@pytest.mark.parametrize("uri", ["s3://videos/gone.mp4", "s3://no-such-bucket/a.mp4"])
def test_an_object_that_is_missing(s3, uri):
    start = time.monotonic()
    with pytest.raises(DecodeError, match="the file is missing"), open_isolated(uri, timeout_s=60):
        pass
    assert storage.are_files([uri]) == [False]
    with pytest.raises(FileNotFoundError):
        storage.version(uri)
    assert time.monotonic() - start < 10


def test_a_store_that_cannot_be_reached(s3):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and never listening: connections are refused
        uri = f"s3://videos/a.mp4?endpoint_override=127.0.0.1:{free.getsockname()[1]}&scheme=http&region=us-east-1"
        start = time.monotonic()
        with (
            pytest.raises(DecodeError, match="Could not connect to server") as caught,
            open_isolated(uri, timeout_s=60),
        ):
            pass
        assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)


def test_passwords_in_a_uri_are_refused_and_not_repeated():
    with pytest.raises(storage.StorageError, match=r"s3://bucket/x: leave user and password out") as error:
        storage.read_bytes("s3://KEY:SECRET@bucket/x")
    assert "SECRET" not in str(error.value)
