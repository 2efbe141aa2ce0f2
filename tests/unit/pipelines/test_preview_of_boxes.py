"""The sheet of key frames: their boxes lie where the crop and the flip of the run put them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from pipelines.cli import main
from pipelines.data import preview
from posmlp.config import load_recipe
from posmlp.detection.clips import load_key_clip, mirror, visible_boxes
from posmlp.tasks import task_of
from tests.helpers.videos import write_video

LABEL_MAP = 'item { name: "sit" id: 1 } item { name: "wave left" id: 2 } item { name: "wave right" id: 3 }'
TRUTH = "a,1,0.1,0.1,0.5,0.6,1\na,1,0.1,0.1,0.5,0.6,2\na,2,0.3,0.2,0.9,0.9,3\nb,1,0.4,0.4,0.8,0.8,1\nb,2,0,0,1,1,2\n"
PEOPLE = "a,1,0.12,0.1,0.5,0.6,,0.9\na,2,0.3,0.2,0.9,0.8,-1,0.85\nb,1,0.4,0.4,0.8,0.7,,0.5\n"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Overrides of the recipe scenes that put two small videos with three actions in place of its set."""
    folder = tmp_path_factory.mktemp("boxes")
    for name in "ab":
        write_video(folder / f"{name}.mp4")
    (folder / "map.pbtxt").write_text(LABEL_MAP)
    (folder / "truth.csv").write_text(TRUTH)
    (folder / "people.csv").write_text(PEOPLE)
    lists = f"{{path: {folder}/truth.csv, boxes: {folder}/people.csv}}"
    return [
        *(f"data.{key}={lists}" for key in ("train", "val")),
        *(f"data.classes={folder}/map.pbtxt", "model.num_classes=3", "data.cache_dir=null", "train.global_batch=4"),
        *("detection.first_second=0", "data.fps=10"),
    ]


def caught(monkeypatch, tmp_path, config, **options):
    """The marks of the sheet by the key frame of their clip."""
    drawn = {}
    keep = lambda clips, titles, head, out, marks: drawn.update(zip(titles, marks, strict=True))  # noqa: E731
    monkeypatch.setattr(preview, "sheet", keep)
    preview.preview(config, tmp_path / "p.png", epoch=0, videos=4, **options)
    return {title.split()[0]: marks for title, marks in drawn.items()}


@pytest.mark.parametrize("flip", [0, 1])
def test_boxes_follow_the_crop_and_the_flip(overrides, monkeypatch, tmp_path, flip):
    exchanged = "augment.flip_classes={wave left: wave right}"
    config = load_recipe("scenes", [*overrides, f"augment.flip={flip}", exchanged, "detection.scale=[1.5, 2]"])
    marks = caught(monkeypatch, tmp_path, config, train=True)
    rows = {row["sample_id"]: row for row in task_of(config).read_split(config, "train").rows.to_pylist()}
    assert marks.keys() == rows.keys() == {"a,0001", "a,0002", "b,0001", "b,0002"}
    names = ["sit", "wave right", "wave left"] if flip else ["sit", "wave left", "wave right"]
    for sample, row in rows.items():
        loaded = load_key_clip(row["uri"], sample, row["time"], config, epoch=0, train=True)
        boxes, kept = visible_boxes(
            np.array(row["boxes"], np.float32).reshape(-1, 4), loaded.shown[0], config.detection.box_share
        )
        boxes = mirror(boxes) if flip else boxes
        expected = [
            (pytest.approx(box.tolist(), abs=1e-6), ", ".join(sorted(names[i] for i in actions)))
            for box, actions, visible in zip(boxes, row["actions"], kept, strict=True)
            if visible
        ]
        found = [(list(mark.corners), ", ".join(sorted(mark.text.split(", ")))) for mark in marks[sample]]
        assert found == expected
        assert {mark.kind for mark in marks[sample] if not mark.text} <= {preview.NEGATIVE}


def test_truth_and_scored_boxes_are_told_apart(overrides, monkeypatch, tmp_path):
    config = load_recipe("scenes", [*overrides, "detection.box_share=0"])
    kinds = {key: [(mark.kind, mark.text) for mark in each] for key, each in caught(
        monkeypatch, tmp_path, config, train=False
    ).items()}  # fmt: skip
    assert kinds["a,0001"] == [(preview.TRUTH, "sit, wave left"), (preview.SCORED, "0.90")]
    assert kinds["a,0002"] == [(preview.TRUTH, "wave right"), (preview.SCORED, "0.85")]
    assert kinds["b,0001"] == [(preview.TRUTH, "sit")]  # its detection scores too low
    alone = load_recipe("scenes", [*overrides, f"data.val={config.data.val.path}"])
    assert caught(monkeypatch, tmp_path, alone, train=False)["b,0002"][0].kind == preview.SCORED_TRUTH


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_sheet_has_the_colours_of_the_boxes(overrides, tmp_path, capsys, split):
    out = tmp_path / "p.png"
    options = ["--out", str(out), "--split", split, "--videos", "3"]
    assert main(["data", "preview", "scenes", *overrides, *options]) == 0, capsys.readouterr().err
    pixels = plt.imread(out)[..., :3]
    for colour in ((0, 1, 0), (1, 165 / 255, 0)):  # lime, orange
        assert (np.abs(pixels - colour).max(-1) < 0.15).sum() > 50


def test_a_frame_is_left_of_the_others_and_twice_as_large():
    import torch

    clips = torch.rand(2, 5, 4, 6, 3)
    strips = preview.with_key_frame(clips)
    large = clips[:, 2].numpy().repeat(2, 1).repeat(2, 2)
    assert np.array_equal(strips[:, :8, :12].numpy(), large)
    assert torch.equal(strips[:, :4, 13:19], clips[:, 0]) and torch.equal(strips[:, 5:9, 13:19], clips[:, 3])
    assert bool((strips[:, 5:9, 27:33] == 1).all())  # nothing: there are five frames
