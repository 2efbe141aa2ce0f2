"""Actions of people whose boxes are given: the same as a plain loop's, drawn where they are, and what is refused."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli import main
from pipelines.inference.predict import predict
from pipelines.inference.predict_boxes import BoxPrediction, BoxPredictor, annotate
from posmlp.detection.clips import load_key_clip
from posmlp.detection.lists import read_person_boxes
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.video.augment import to_input
from posmlp.video.manifest import ManifestError
from tests.helpers.key_frames import ACTIONS, RATE, detection_recipe, write_videos
from tests.helpers.random_models import videos_of, write_checkpoint
from tests.helpers.small_runs import recipe_for
from tests.helpers.videos import number, write_video

BOXES = """\
tall,0001,0.100,0.200,0.600,0.700,-1,0.95
wide,0002,0.000,0.100,0.500,0.900,,0.9
tall,0003,0.300,0.100,0.900,0.800,4,0.85
tall,0003,0.050,0.100,0.400,0.400,4,0.99
tall,0003,0.050,0.100,0.400,0.400,5,0.99
tall,0002,0.050,0.100,0.400,0.400,5,0.79
other,0002,0.050,0.100,0.400,0.400,5,0.99
"""
EXPECTED = [  # of the file "tall", in the order of seconds
    (1, (0.1, 0.2, 0.6, 0.7)),
    (3, (0.3, 0.1, 0.9, 0.8)),
    (3, (0.05, 0.1, 0.4, 0.4)),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a detection model whose lists start at second 0, its recipe, and the model."""
    config = detection_recipe(data={"cache_dir": "unused"})
    checkpoint, model = write_checkpoint(tmp_path_factory.mktemp("runs") / "boxes", config, classes=ACTIONS)
    return checkpoint, config, model


@pytest.fixture
def boxes(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text(BOXES)
    return str(path)


def plain_shares(model, config, file, time, box):
    """Probabilities of a box by itself."""
    data = config.data.model_copy(update={"cache_dir": None})
    config = task_of(config).for_evaluation(config.model_copy(update={"data": data}))
    clip = load_key_clip(file, "any", time, config, epoch=0, train=False).clips
    with torch.no_grad():
        x = to_input(torch.from_numpy(clip[0])[None], config)
        return model(x, torch.tensor([box]), torch.zeros(1, dtype=torch.int64))[0].double().sigmoid().numpy()


def test_probabilities_are_those_of_each_box_by_itself(trained, videos, boxes):
    checkpoint, config, model = trained
    found = list(BoxPredictor(checkpoint, boxes).predict([videos["tall"]], top=6))
    assert [(p.second, p.box) for p in found] == EXPECTED
    for prediction in found:
        expected = plain_shares(model, config, videos["tall"], prediction.second, prediction.box)
        assert [name for name, _ in prediction.top] == [ACTIONS[i] for i in np.argsort(-expected)]
        np.testing.assert_allclose([share for _, share in prediction.top], np.sort(expected)[::-1], atol=1e-4)


def test_the_first_second_of_the_list_and_the_threshold(trained, videos, tmp_path):
    checkpoint, config, model = trained
    (tmp_path / "boxes.csv").write_text("902,0.1,0.2,0.6,0.7\n")
    (found,) = BoxPredictor(checkpoint, str(tmp_path / "boxes.csv"), 900).predict([videos["tall"]], 6, 0.5)
    expected = plain_shares(model, config, videos["tall"], 2.0, found.box)
    assert {name for name, _ in found.top} == {ACTIONS[i] for i in np.flatnonzero(expected >= 0.5)}
    assert found.second == 902


def test_one_bad_file_or_second_costs_no_other(trained, videos, boxes, tmp_path):
    checkpoint, *_ = trained
    broken = tmp_path / "other.mp4"
    broken.write_bytes(b"no video")
    with open(boxes, "a") as file:
        file.write("tall,0099,0.1,0.2,0.6,0.7,-1,0.95\n")
    strange = write_video(tmp_path / "stranger.mp4", 48, 48, count=4)
    found = list(BoxPredictor(checkpoint, boxes).predict([str(broken), strange, videos["tall"]]))
    assert [(p.file, p.second, bool(p.error)) for p in found] == [
        (str(broken), 2, True),
        (strange, None, True),
        *((videos["tall"], second, False) for second, _ in EXPECTED),
        (videos["tall"], 99, True),
    ]
    assert f"{boxes} has no box of 'stranger'; it has boxes of 'other', 'tall', 'wide'" in found[1].error
    assert "99 s is not in the video, which lasts 4.00 s; set --first-second to" in found[-1].error


def test_the_command_prints_boxes_and_tells_what_is_bad(trained, videos, boxes, capsys):
    checkpoint, *_ = trained
    assert main(["predict", checkpoint, videos["tall"], "--boxes", boxes, "--json", "--top", "2"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["file"], line["second"], tuple(line["box"])) for line in lines] == [
        (videos["tall"], *each) for each in EXPECTED
    ]
    expected = list(BoxPredictor(checkpoint, boxes).predict([videos["tall"]], top=2))
    assert [line["top"] for line in lines] == [
        [{"class": name, "probability": share} for name, share in p.top] for p in expected
    ]
    assert "the boxes of other videos are left out: 'other', 'wide'" in err
    assert main(["predict", checkpoint, videos["tall"], "absent/other.mp4", "--boxes", boxes, "--top", "1"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"{videos['tall']}, second 1, box 0.100 0.200 0.600 0.700"
    assert out.splitlines()[1].startswith(f"  {expected[0].top[0][0]}")
    assert "posmlp: absent/other.mp4, second 2: " in err


def read_frames(path):
    with av.open(str(path)) as container:
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def as_small(frames, like):
    """Enlarged frames at the size of others: the mean of each square."""
    (height, width, _), factor = like[0][1].shape, len(frames[0][1]) // len(like[0][1])
    return [(time, frame.reshape(height, factor, width, factor, 3).mean((1, 3))) for time, frame in frames]


def test_an_annotated_video_has_all_frames_and_boxes_around_their_second(trained, tmp_path):
    """The frames say their numbers; a box is drawn where its border differs from the frame, and only then."""
    _, config, _ = trained
    source = write_video(tmp_path / "in.mp4", 321 // 2 * 2, 240, count=40, rate=RATE)
    box = (0.25, 0.0, 0.75, 0.5)
    annotate(source, str(tmp_path / "out.mp4"), [BoxPrediction(source, 2, box, (("sit $", 0.5),))], config)
    frames, before = read_frames(tmp_path / "out.mp4"), read_frames(source)
    assert frames[0][1].shape == (480, 640, 3)  # small frames are enlarged, so that labels can be read
    frames = as_small(frames, before)
    assert [round(time, 3) for time, _ in frames] == [round(time, 3) for time, _ in before]
    assert len(frames) == 40
    for i, ((_, frame), (_, old)) in enumerate(zip(frames, before, strict=True)):
        assert number(frame[120:]) == number(old[120:]) or i  # below the box
        changed = np.abs(frame.astype(int) - old).max(-1) > 60
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        if 15 <= i < 25:  # half a second before and after
            assert (rows.min(), columns.min()) == (pytest.approx(0, abs=2), pytest.approx(80, abs=2))
            assert (rows.max(), columns.max()) == (pytest.approx(119, abs=2), pytest.approx(239, abs=2))
            assert not changed[40:110, 100:220].any()  # the inside is as it was
        else:
            assert not len(rows)


def test_the_times_and_odd_sides_of_a_video_stay(trained, tmp_path):
    _, config, _ = trained
    times = [0, 100, 150, 900, 2000]
    source = write_video(
        tmp_path / "in.mp4", 49, 37, count=5, codec="libx264", pix_fmt="yuv444p", times=times, options={"bf": "0"}
    )
    annotate(source, str(tmp_path / "out.mp4"), [BoxPrediction(source, 1, (0, 0, 1, 1), ())], config)
    frames = read_frames(tmp_path / "out.mp4")
    assert [round(time, 3) for time, _ in frames] == [t / 1000 for t in times]
    assert {frame.shape for _, frame in frames} == {(480, 636, 3)}  # 13 times, and even


def test_the_command_draws_what_it_prints(trained, videos, boxes, tmp_path, capsys):
    checkpoint, *_ = trained
    out = tmp_path / "out.mp4"
    assert main(["predict", checkpoint, videos["tall"], "--boxes", boxes, "--video", str(out)]) == 0
    before = read_frames(videos["tall"])
    after = as_small(read_frames(out), before)
    drawn = [np.abs(a.astype(int) - b).max() > 100 for (_, a), (_, b) in zip(after, before, strict=True)]
    assert drawn == [5 <= i < 15 or 25 <= i < 35 for i in range(40)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--video", "out.mp4"], "--video is for a detection model"),
        (["--threshold", "0.5"], "--threshold is for a detection model"),
        (["--first-second", "900"], "--first-second is for a detection model"),
        ([], "is a model for detection; give the boxes of the people in the videos, as in --boxes boxes.csv"),
        (["--boxes", "{boxes}", "--views", "1x3"], "--views: a key frame has one view"),
        (["--boxes", "{boxes}", "--video", "out.avi"], "--video out.avi: expected the path of a file"),
        (["--boxes", "{boxes}", "--video", "s3://bucket/out.mp4"], "expected the path of a file on this machine"),
        (["--boxes", "{boxes}", "--threshold", "50"], "--threshold 50: expected a probability from 0 to 1"),
        (["--boxes", "absent.csv"], "absent.csv"),
        (["--boxes", "{boxes}", "--video", "/proc/none/out.mp4"], "/proc/none/out.mp4 cannot be written"),
    ],
)
def test_what_is_refused(trained, videos, boxes, capsys, options, expected):
    options = [option.replace("{boxes}", boxes) for option in options]
    assert main(["predict", trained[0], videos["tall"], *options]) == 1
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err


def test_an_annotated_copy_does_not_replace_its_video(trained, videos, boxes, tmp_path, capsys):
    video = tmp_path / "clip.mp4"
    video.write_bytes(Path(videos["tall"]).read_bytes())
    (tmp_path / "link.mp4").symlink_to(video)
    for file, out in ((video, video), (f"file://{video}", video), (video, tmp_path / "link.mp4")):
        assert main(["predict", trained[0], str(file), "--boxes", boxes, "--video", str(out)]) == 1
        assert f"--video {out} is the file itself, which the copy would replace" in capsys.readouterr().err
    assert video.read_bytes() == Path(videos["tall"]).read_bytes()


def test_a_video_that_breaks_after_its_last_key_second_has_no_annotated_copy(trained, videos, boxes, tmp_path, capsys):
    """Its boxes are printed all the same."""
    whole = Path(videos["tall"])
    times, place = [time for time, _ in read_frames(whole)], tmp_path / whole.name
    with av.open(str(whole)) as container:
        packets = sorted((packet.pos, packet.size) for packet in container.demux(video=0) if packet.pos is not None)
    content = bytearray(whole.read_bytes())
    for pos, size in packets[len(times) - 4 :]:
        content[pos : pos + size] = bytes(size)
    place.write_bytes(content)
    assert main(["predict", trained[0], str(place), "--boxes", boxes, "--video", str(tmp_path / "out.mp4")]) == 1
    out, err = capsys.readouterr()
    assert out and "Traceback" not in err and f"{tmp_path}/out.mp4 was not written: {place}: " in err
    assert not (tmp_path / "out.mp4").exists()


def test_an_annotated_video_is_of_one_file(trained, videos, boxes, capsys):
    assert main(["predict", trained[0], *videos.values(), "--boxes", boxes, "--video", "out.mp4"]) == 1
    assert "--video out.mp4 is a copy of one file; give one, not 2" in capsys.readouterr().err


def test_boxes_for_a_recognition_model_are_refused(motion_set, boxes, tmp_path):
    checkpoint, _ = write_checkpoint(tmp_path / "small", recipe_for(tmp_path, motion_set, "model.num_classes=8"))
    with pytest.raises(UserError, match="is a model for recognition; leave out --boxes: it classifies whole videos"):
        BoxPredictor(checkpoint, boxes)
    assert next(predict(checkpoint, videos_of(motion_set, 1))).top


def test_boxes_without_names_are_of_one_file(trained, videos, tmp_path):
    (tmp_path / "boxes.csv").write_text("1,0.1,0.2,0.6,0.7,-1,0.9\n")
    predictor = BoxPredictor(trained[0], str(tmp_path / "boxes.csv"))
    with pytest.raises(UserError, match="names no videos; give one file"):
        predictor.predict([*videos.values()])
    (tmp_path / "boxes.csv").write_text("1,0.1,0.2,0.6,0.7,-1,0.5\n")
    with pytest.raises(UserError, match=r"no box has a score of 0\.8 \(detection\.min_score\)"):
        BoxPredictor(trained[0], str(tmp_path / "boxes.csv"))


# The list -------------------------------------------------------------------------------------------------------------


def test_all_problems_of_a_list_with_file_and_line(tmp_path):
    path = tmp_path / "boxes.csv"
    lines = ["a,1,0.1,0.1,0.5,0.5", ",2,0.1,0.1,0.5,0.5", "a,two,0.1,0.1,0.5,0.5", "a,1,0.1,0.1,1.5,0.5"]
    path.write_text("\n".join([*lines, "a,1,0.5,0.1,0.1,0.5", "a,1,0.1", ""]))
    with pytest.raises(ManifestError) as caught:
        read_person_boxes(str(path))
    problems = [problem.removeprefix(f"{path}:") for problem in caught.value.problems]
    assert [problem.split(": ")[0] for problem in problems] == ["2", "3", "4", "5", "6"]
    for problem, part in zip(problems, ["video", "'two'", "'1.5'", "not more than", "3 columns, not 6"], strict=True):
        assert part in problem


fractions = st.integers(0, 9).map(lambda x: x / 10)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 3), fractions, fractions, st.sampled_from([0.25, 0.5, 1.0])),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
    st.booleans(),
)
def test_a_list_is_read_as_written_each_box_once(tmp_path_factory, people, named, scored):
    path, lines, expected = tmp_path_factory.getbasetemp() / "people.csv", [], {}
    for i, (video, second, x, y, score) in enumerate(people):
        box = f"{second},{x},{y},1.0,1.0" if i % 2 else f"{second:04d},{x},{y},1.0,1.0"
        lines.append((f"{video}," if named else "") + box + (f",{i + 1},{score}" if scored else ""))
        expected.setdefault((video if named else "", box), (second, (x, y, 1.0, 1.0), score if scored else 1.0))
    path.write_text("\n".join(lines))
    found = read_person_boxes(str(path))
    assert found.videos == (tuple(video for video, _ in expected) if named else None)
    assert found.seconds.tolist() == [second for second, *_ in expected.values()]
    np.testing.assert_array_equal(found.corners, np.float32([corners for _, corners, _ in expected.values()]))
    assert found.scores.tolist() == [score for *_, score in expected.values()]
