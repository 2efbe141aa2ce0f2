"""The embedded set of drawn faces: what moves in the pixels, what can be known without order, and its files."""

from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image
from scipy import stats

from posmlp.config import load_recipe
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.video import faces
from posmlp.video.faces import FIRST_PART, LAYOUTS, PARTS, Face, Pose, make_face_set, plan_clips, render_face, stream
from posmlp.video.manifest import read_split
from posmlp.video.sampling import uniform_indices

SMALL = {"subjects": 2, "clips": 4, "size": 32}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_face_set(tmp_path_factory.mktemp("faces") / "set", **SMALL)


def tree(folder):
    """The files' bytes; of workbooks, which store the time, the cells."""
    return {
        path.relative_to(folder).as_posix(): [*cells(path)] if path.suffix == ".xlsx" else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cells(path):
    return openpyxl.load_workbook(path).active.iter_rows(values_only=True)


def drawn(order, seed=0, **options):
    return render_face(Face.draw(np.random.default_rng(seed)), order, np.random.default_rng(seed), **options)


def still(parts, face=None, size=160):
    """A face with its parts moved by ``parts``, without noise: [H, W, 3]."""
    face = face or Face.draw(np.random.default_rng(3))
    return face.paint(Pose(np.array([parts], np.float32), np.zeros((1, 2), np.float32)), size)[0]


# Motion ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("seed", range(4))
def test_a_part_moves_up_by_about_its_amount_and_nothing_else_does(part, seed):
    """The movement is that of the image which fits best, among the images of rows moved by hundredths of the frame."""
    face = Face.draw(np.random.default_rng(seed))
    amounts = np.zeros(3)
    amounts[part] = faces.RISE[part]
    rest, moved = still(np.zeros(3), face), still(amounts, face)
    changed = np.abs(moved - rest).max(-1) > 0.02
    rows = np.flatnonzero(changed.any(1)) / 160 - 0.5
    places = {"brows": (-0.16, -0.05), "eyes": (-0.05, 0.19), "mouth": (0.18, 0.31)}[PARTS[part]]
    assert places[0] < rows.min() and rows.max() < places[1]
    assert changed.mean() < 0.03
    assert 0.5 < faces.RISE[part] * 64 < 2  # pixels of the set


def test_brows_and_corners_of_the_mouth_rise_and_lids_close():
    def height(image, box, darker):
        """Mean height of the pixels that are darker than a share of the region's brightest, in pixels."""
        top, bottom, left, right = (round((value + 0.5) * 160) for value in box)
        region = image[top:bottom, left:right].mean(-1)
        ys, _ = np.nonzero(region < darker * region.max())
        return ys.mean()

    face = Face.draw(np.random.default_rng(3))
    face = replace(face, skin=np.full(3, 0.9), hair=np.full(3, 0.1), lips=np.full(3, 0.3), light=0.0)
    rest = still(np.zeros(3), face)
    brows, eyes, mouth = (still(np.eye(3)[i] * 0.03, face) for i in range(3))
    region = (-0.16, -0.055, 0.06, 0.22)
    assert height(rest, region, 0.4) - height(brows, region, 0.4) == pytest.approx(0.03 * 160, abs=0.5)
    corner = (0.16, 0.30, 0.75 * face.mouth_width, 0.95 * face.mouth_width)
    assert 0.5 < (height(rest, corner, 0.5) - height(mouth, corner, 0.5)) / (0.03 * 160) < 1
    white = (-0.03, 0.03, 0.06, 0.22)
    top, bottom, left, right = (round((value + 0.5) * 160) for value in white)
    bright = [(image[top:bottom, left:right].min(-1) > 0.89).sum() for image in (rest, eyes)]
    assert bright[1] < 0.5 * bright[0]


def movement_of(clip, act):
    """The part that moves most in each act, by the rows of pixels that change. The clip is without noise."""
    frames = clip.frames[clip.onset : clip.offset + 1].astype(float).mean(-1)
    found = []
    for k in range(3):
        frames_of_act = frames[k * act : (k + 1) * act]
        change = np.abs(frames_of_act[3 * act // 4] - frames_of_act[0])
        size = change.shape[0]
        rows = (np.arange(size) + 0.5) / size - 0.5
        bands = {"brows": (-0.16, -0.05), "eyes": (-0.045, 0.17), "mouth": (0.18, 0.31)}
        found.append(max(bands, key=lambda name: change[(rows > bands[name][0]) & (rows < bands[name][1])].sum()))
    return found


@pytest.mark.parametrize("order", list(permutations(PARTS)))
def test_the_pixels_move_in_the_order_of_the_parts(order, monkeypatch):
    monkeypatch.setattr(faces, "NOISE", (0.0, 0.0))
    monkeypatch.setattr(faces, "FLICKER", 0.0)
    monkeypatch.setattr(faces, "SWAY", 0.0)
    for seed in range(2):
        assert movement_of(drawn(order, seed, size=96, around=(3, 4)), 10) == [*order]


# What can be known without the order of frames ------------------------------------------------------------------------


def test_a_clip_has_the_same_frames_in_any_order_of_the_parts():
    """So an unordered set of frames tells nothing about the class."""
    for seed in range(3):
        clips = [drawn(order, seed, size=32, act=9, around=(3, 5)) for order in permutations(PARTS)]
        for clip in clips:
            assert (clip.onset, clip.offset) == (3, 3 + 27 - 1) and len(clip.frames) == 3 + 27 + 5
        frames = [sorted(frame.tobytes() for frame in clip.frames[3:30]) for clip in clips]
        assert all(each == frames[0] for each in frames[1:])
        assert len({clip.frames.tobytes() for clip in clips}) == 6
        for clip in clips[1:]:  # what lies around is the same in place
            np.testing.assert_array_equal(clip.frames[:3], clips[0].frames[:3])
            np.testing.assert_array_equal(clip.frames[30:], clips[0].frames[30:])


@pytest.mark.parametrize("act", range(faces.ACT_FRAMES[0], faces.ACT_FRAMES[1] + 1))
@pytest.mark.parametrize("count", [6, 9, 12, 15, 24])
def test_sampled_frames_are_the_same_too_if_their_number_is_a_multiple_of_three(act, count):
    clips = [drawn(order, act, size=32, act=act) for order in permutations(PARTS)]
    sampled = [clip.frames[uniform_indices(3 * act, count, None)] for clip in clips]
    frames = [sorted(frame.tobytes() for frame in each) for each in sampled]
    assert all(each == frames[0] for each in frames[1:])


def test_lengths_order_and_light_do_not_depend_on_the_class():
    """All that is planned of a clip has the same law in each class; the parts after the first follow in both orders."""
    clips = [clip for i in range(3) for clip in plan_clips(LAYOUTS[i], (7, i), 12, 24)]
    lengths = {kind: [clip.act for clip in clips if clip.kind == kind] for kind in FIRST_PART}
    for kind in ("positive", "surprise"):
        assert stats.ks_2samp(lengths["negative"], lengths[kind]).pvalue > 1e-3
    orders = Counter()
    for clip in clips:
        orders[clip.kind, clip.order] += 1
    for kind, first in FIRST_PART.items():
        of_kind = {order: count for (other, order), count in orders.items() if other == kind}
        assert len(of_kind) == 2 and all(order[0] == first for order in of_kind)
        assert stats.binomtest(max(of_kind.values()), sum(of_kind.values())).pvalue > 1e-3
    assert len({order for kind, order in orders if kind is None}) == 6


# The files ------------------------------------------------------------------------------------------------------------


def test_the_coding_file_of_casme2(small):
    header, *rows = cells(small / "CASME2" / "CASME2-coding-20140508.xlsx")
    names = ("Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None, "Action Units")
    assert header == (*names, "Estimated Emotion")
    assert [row[0] for row in rows] == ["01"] * 8 + ["02"] * 8
    emotions = ["disgust", "happiness", "repression", "surprise", "others", "others", "sadness", "fear"]
    assert [row[8] for row in rows] == 2 * emotions
    assert [row[1] for row in rows[:5]] == ["EP01_01f", "EP01_02f", "EP01_03f", "EP01_04f", "EP02_01f"]
    for subject, name, _, onset, apex, offset, _, _, emotion in rows:
        folder = small / "CASME2" / "Cropped" / f"sub{subject}" / name
        numbers = sorted(int(path.stem.removeprefix("reg_img")) for path in folder.iterdir())
        assert numbers == [*range(numbers[0], numbers[-1] + 1)]
        assert numbers[0] + 3 <= onset and offset + 3 <= numbers[-1]
        assert apex == "/" if emotion == "sadness" else onset < apex < offset


def test_the_coding_file_of_samm(small):
    rows = [*cells(small / "SAMM" / "SAMM_Micro_FACS_Codes_v2.xlsx")]
    end = ("Duration", "Micro", "Action Units", "Estimated Emotion", "Objective Classes")
    assert rows[13] == ("Subject", "Filename", "Onset Frame", "Apex Frame", "Offset Frame", *end)
    assert [row[0] for row in rows[14:]] == ["006"] * 6 + ["007"] * 6
    emotions = ["Anger", "Happiness", "Contempt", "Surprise", "Other", "Other"]
    assert [row[8] for row in rows[14:]] == 2 * emotions
    for subject, name, onset, apex, offset, duration, *_ in rows[14:]:
        assert name.startswith(f"{subject}_") and duration == offset - onset + 1
        numbers = [int(path.stem.removeprefix(f"{subject}_")) for path in (small / "SAMM" / subject / name).iterdir()]
        assert min(numbers) + 3 <= onset < apex < offset <= max(numbers) - 3
        assert (small / "SAMM" / subject / name / f"{subject}_{onset:05d}.jpg").exists()
    with Image.open(next((small / "SAMM" / "006").rglob("*.jpg"))) as image:
        assert image.mode == "L"


def test_the_folders_of_smic(small):
    clips = sorted(path.relative_to(small / "SMIC" / "HS").as_posix() for path in small.glob("SMIC/HS/*/micro/*/*"))
    names = ["negative/{}_ne_01", "negative/{}_ne_03", "positive/{}_po_02", "surprise/{}_su_04"]
    assert clips == [f"{s}/micro/{name.format(s)}" for s in ("s1", "s2") for name in names]
    for clip in clips:
        numbers = sorted(int(path.stem.removeprefix("image")) for path in (small / "SMIC" / "HS" / clip).iterdir())
        assert numbers == [*range(numbers[0], numbers[-1] + 1)] and len(numbers) in range(24, 37, 3)


def test_frames_outside_onset_and_offset_show_what_the_expression_does_not(small):
    """The largest change from rest is outside in all clips, so a reader that ignores the coding is noticed."""
    for subject, name, _, onset, _, offset, *_ in [*cells(small / "CASME2" / "CASME2-coding-20140508.xlsx")][1:]:
        paths = (small / "CASME2" / "Cropped" / f"sub{subject}" / name).iterdir()
        frames = {int(p.stem.removeprefix("reg_img")): np.asarray(Image.open(p), float) for p in paths}
        frames = {number: frame / frame.mean() for number, frame in frames.items()}  # the light flickers
        rest = np.median([frame for number, frame in frames.items() if onset <= number <= offset], axis=0)
        change = {number: np.abs(frame - rest).mean() for number, frame in frames.items()}
        inside = max(value for number, value in change.items() if onset <= number <= offset)
        for outside in (range(min(frames), onset), range(offset + 1, max(frames) + 1)):
            assert max(change[number] for number in outside) > inside


def overrides(folder, name):
    """Overrides that put a set in place of that of a recipe, with the lists that have its format."""
    sections = {
        "casme2": f"{{path: {folder}/{faces.CASME2_CODING}, root: {folder}/CASME2/Cropped}}",
        "samm": f"{{path: {folder}/{faces.SAMM_CODING}, root: {folder}/SAMM}}",
        "smic": f"{{path: {folder}/SMIC/HS}}",
    }
    sections["megc"] = f"[{', '.join(sections.values())}]"
    return [f"data.train={sections[name]}", "data.cache_dir=null", "model.image_size=32", "data.short_side=32"]


def test_the_recipe_faces_reads_the_composite_from_onset_to_offset(small):
    """All clips of the three classes, with the pixels that are drawn between onset and offset."""
    config = load_recipe("faces", overrides(small, "megc"))
    train, val = (read_split(config.data, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("negative", "positive", "surprise")
    planned = [
        clip
        for i, layout in enumerate(LAYOUTS)
        for clip in plan_clips(layout, (0, i), SMALL["subjects"], SMALL["clips"])
    ]
    composite = {clip.files()[0].rpartition("/")[0]: clip for clip in planned if clip.kind}
    assert len(composite) == len(train.rows) + len(val.rows) == 3 * 2 * 4
    held_out = {"CASME2/Cropped/sub01", "SAMM/006", "SMIC/HS/s1"}
    for manifest in (train, val):
        for row in manifest.rows.to_pylist():
            folder = Path(row["uri"]).parent.relative_to(small).as_posix()
            clip = composite.pop(folder)
            assert manifest.classes[row["label"]] == clip.kind
            assert any(folder.startswith(f"{subject}/") for subject in held_out) == (manifest is val)
            drawn = clip.draw(SMALL["size"])
            (seen,) = task_of(config).load(row, config, epoch=0, train=False).clips
            wanted = drawn.frames[drawn.onset + uniform_indices(3 * clip.act, len(seen), None)]
            if folder.startswith("SAMM"):
                wanted = np.repeat(wanted.astype(float).mean(-1, keepdims=True), 3, -1)
            errors = [np.abs(seen - np.roll(wanted.astype(float), shift, 0)).mean() for shift in (-1, 0, 1)]
            assert errors[1] == min(errors) and errors[1] < 6
    assert not composite


@pytest.mark.parametrize(("name", "rows"), [("casme2", 12), ("samm", 12), ("smic", 8)])
def test_each_part_is_read_in_its_own_classes(small, name, rows):
    config = load_recipe(f"{name}_s16", overrides(small, name))
    splits = [read_split(config.data, split).rows["sample_id"].to_pylist() for split in ("train", "val")]
    assert len({*splits[0], *splits[1]}) == rows
    subjects = [{each.split("/")[0] for each in split} for split in splits]
    assert not subjects[0] & subjects[1]


def test_subjects_differ_and_are_the_same_in_all_of_their_clips(small):
    frames = {}
    for path in sorted(small.glob("SMIC/HS/*/micro/*/*")):
        frame = np.asarray(Image.open(sorted(path.iterdir())[0]), float)
        frames.setdefault(path.parents[2].name, []).append(frame / frame.mean())
    within = max(np.abs(one - other).mean() for each in frames.values() for one in each for other in each)
    between = min(np.abs(one - other).mean() for one in frames["s1"] for other in frames["s2"])
    assert between > 2 * within


def test_a_set_is_the_same_again_and_left_as_it_is(small, tmp_path):
    again = make_face_set(tmp_path / "set", **SMALL)
    assert tree(again) == tree(small)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    make_face_set(again, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*")} == before
    other = make_face_set(tmp_path / "other", **SMALL | {"seed": 1})
    assert tree(other).keys() != tree(small).keys()


def test_a_set_of_a_killed_run_is_completed(small, tmp_path):
    folder = make_face_set(tmp_path / "set", **SMALL)
    (folder / "faces.json").unlink()
    (folder / faces.SAMM_CODING).unlink()
    next(folder.glob("SMIC/HS/s2/micro/positive/*/*.jpg")).write_bytes(b"half a file")
    make_face_set(folder, **SMALL)
    assert tree(folder) == tree(small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 16}, "size must be at least 32, not 16"),
        ({"subjects": 0}, "1 to 90 subjects with 4 to 90 clips each, not 0 with 4"),
        ({"clips": 3}, "1 to 90 subjects with 4 to 90 clips each, not 2 with 3"),
        ({"seed": 7}, "do not belong to this faces set|holds another faces set"),
    ],
)
def test_what_cannot_be_drawn_is_explained(small, change, words):
    before = tree(small)
    with pytest.raises(UserError, match=words):
        make_face_set(small, **SMALL | change)
    assert tree(small) == before


def test_an_order_without_all_parts_is_refused():
    with pytest.raises(ValueError, match="order brows, eyes must have each of brows, eyes, mouth once"):
        drawn(("brows", "eyes"))
    assert stream(1, 2).random() != stream(1, 3).random()
