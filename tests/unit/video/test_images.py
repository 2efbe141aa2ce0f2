"""Images as clips of one frame: any kind of picture, a spatial model trained on them, a video model built on it."""

import io

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageOps

import posmlp
from pipelines.data.loader import decode_rows
from posmlp.config import load_recipe
from posmlp.learn.learner import Learner
from posmlp.tasks import task_of
from posmlp.video.decode import DecodeError, open_video
from posmlp.video.manifest import read_split

ORIENTATION = 0x0112  # the EXIF tag


def smooth(seed=0, size=(120, 80)):
    """A picture without symmetries."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(path):
    """Decode an image."""
    return open_video(str(path), 1).read([0])[0].astype(int)


# Pictures -------------------------------------------------------------------------------------------------------------

EXACT = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("order", ["little", "big"])
def test_a_picture_is_upright_as_pillow_shows_it(tmp_path, kind, orientation, order):
    picture = smooth()
    exif = picture.getexif()
    exif.endian = "<" if order == "little" else ">"
    exif[0x010E] = "described"  # a tag before it
    exif[ORIENTATION] = orientation
    path = tmp_path / "a"
    path.write_bytes(encoded(picture, kind, exif=exif.tobytes(), **EXACT[kind]))
    assert (b"II*\0" if order == "little" else b"MM\0*") in path.read_bytes()
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    actual = shown(path)
    assert actual.shape == expected.shape == ((120, 80, 3) if orientation > 4 else (80, 120, 3))
    assert np.abs(actual - expected).max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("exif", [b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0" + bytes(30)])
def test_damaged_exif_data_are_ignored(tmp_path, exif):
    (tmp_path / "a.jpg").write_bytes(encoded(smooth(), "JPEG", exif=b"Exif\0\0" + exif))
    assert shown(tmp_path / "a.jpg").shape == (80, 120, 3)


@pytest.mark.parametrize(
    ("kind", "mode", "options", "tolerance"),
    [
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}, 1),
        ("JPEG", "CMYK", {}, 4),  # 22 of ImageNet's
        ("JPEG", "L", {}, 1),
        ("PNG", "RGBA", {}, 0),
        ("PNG", "LA", {}, 0),
        ("PNG", "1", {}, 0),
        ("WEBP", "RGBA", {"lossless": True}, 0),
        ("WEBP", "RGB", {"quality": 90}, 8),  # colours at half the size, which each decoder enlarges its way
    ],
)
def test_kinds_of_pictures(tmp_path, kind, mode, options, tolerance):
    content = encoded(smooth().convert(mode), kind, **options)
    (tmp_path / "a.JPEG").write_bytes(content)  # the content tells the kind, and not the name
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert np.abs(shown(tmp_path / "a.JPEG") - expected).mean() <= tolerance


def test_bytes_after_a_picture_are_ignored(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(smooth(), "JPEG") + bytes(99) + b"more")
    assert shown(tmp_path / "a.jpg").shape == (80, 120, 3)


@pytest.mark.parametrize("kind", EXACT)
def test_a_picture_cut_short_is_refused(tmp_path, kind):
    content = encoded(smooth(), kind, **EXACT[kind])
    for part in (0.1, 0.5, 0.9):
        (tmp_path / "a").write_bytes(content[: int(part * len(content))])
        with pytest.raises(DecodeError, match="the picture is damaged, or not JPEG"):
            shown(tmp_path / "a")


def test_an_animation_is_no_picture(tmp_path):
    (tmp_path / "a.webp").write_bytes(encoded(smooth(), "WEBP", save_all=True, append_images=[smooth(1)]))
    with pytest.raises(DecodeError, match="the picture is damaged, or not JPEG"):
        shown(tmp_path / "a.webp")


# An image folder ------------------------------------------------------------------------------------------------------

COLOURS = {"n01": (200, 60, 40), "n02": (40, 60, 200)}


def write_tree(root, count=8):
    """Two classes that differ in colour, with several sizes and noise."""
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).normal(0, 30, (40 + i, 60, 3))
            picture = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
            picture.save(root / name / f"{i}.{'png' if i % 2 else 'JPEG'}")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("images") / "{train}")  # braces in a name stand for themselves


def recipe(path, *overrides):
    """The image recipe, with a tiny model."""
    small = ["model.name=tiny", "model.image_size=32", "model.num_classes=2", "model.drop_path=0", "data.short_side=64"]
    run = ["scaling.workers=1", "scaling.use_gpu=false", "train.precision=fp32", "train.global_batch=16"]
    places = [f"data.{split}={{path: '{path}'}}" for split in ("train", "val")]
    return load_recipe("in1k_s", [*small, *run, *places, *overrides])


def decoded(config, epoch=0, train=True):
    rows = read_split(config.data, "train" if train else "val").rows
    return decode_rows(rows, np.ones(len(rows), bool), config, epoch, train)


def collated(config, epoch=0, train=True):
    rows = read_split(config.data, "train" if train else "val").rows
    return task_of(config).collate(decoded(config, epoch, train), rows, config, train=train)


def test_a_folder_and_parquet_files_give_the_same_clips(tree, tmp_path):
    rows = read_split(recipe(tree).data, "train").rows.to_pylist()
    assert [row["sample_id"] for row in rows][:2] == ["n01/0.JPEG", "n01/1.png"]
    expected = decoded(recipe(tree))
    assert expected["clip"].shape == (16, 1, 1, 32, 32, 3)
    assert list(expected["reason"]) == [""] * 16
    columns = {"label": [row["label"] for row in rows], "sample_id": [row["sample_id"] for row in rows]}
    inline = {"data": [(tree / row["sample_id"]).read_bytes() for row in rows]}
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table(columns | inline), tmp_path / "shards/0.parquet", row_group_size=5)
    uris = {"uri": [str(tree / row["sample_id"]) for row in rows]}
    pq.write_table(pa.table(columns | uris), tmp_path / "uris.parquet")
    for place, root in (("shards", None), ("shards/0.parquet", None), ("uris.parquet", tree)):
        actual = decoded(recipe(tmp_path / place, *([f"data.train.root={root}"] if root else [])))
        assert np.array_equal(actual["clip"], expected["clip"])
        assert np.array_equal(actual["seeds"], expected["seeds"])


def test_images_of_a_store(tree):
    system = fsspec.filesystem("memory")
    content = pa.BufferOutputStream()
    pictures = [(tree / name / "1.png").read_bytes() for name in COLOURS]
    pq.write_table(pa.table({"data": pictures, "label": list(COLOURS)}), content)
    try:
        for name, picture in zip(COLOURS, pictures, strict=True):
            system.pipe_file(f"/images/tree/{name}/1.png", picture)
        system.pipe_file("/images/shards/0.parquet", content.getvalue().to_pybytes())
        for place in ("tree", "shards", "shards/0.parquet"):
            rows = read_split(recipe(f"memory://images/{place}").data, "train").rows.to_pylist()
            found = [open_video(row["uri"], row["frames"]).read([0])[0] for row in rows]
            assert [pixels.mean((0, 1)).argmax() for pixels in found] == [0, 2]  # red and blue
    finally:
        system.rm("/images", recursive=True)


def test_bad_images_are_reported_and_not_counted(tmp_path):
    root = write_tree(tmp_path / "images", count=2)
    (root / "n01/0.JPEG").write_bytes(b"<html>")
    (root / "n02/1.png").write_bytes((root / "n02/1.png").read_bytes()[:500])
    columns = decoded(recipe(root))
    assert ["damaged" in reason for reason in columns["reason"]] == [True, False, False, True]
    assert collated(recipe(root)).weights.tolist() == [0, 1, 1, 0]


def test_small_crops_are_cut_from_the_whole_image(tmp_path):
    """Fine stripes stay visible; scaling down beforehand would blur them to grey."""
    stripes = np.zeros((500, 500, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(stripes).save(tmp_path / "a/0.png")
    overrides = ["model.image_size=224", "data.crop_scale=[0.08, 0.08]", "data.crop_ratio=[1, 1]"]
    sides = (load_recipe("in1k_s").data.short_side, 256)
    configs = (recipe(tmp_path, *overrides, f"data.short_side={side}") for side in sides)
    sharp, blurred = (decoded(config)["clip"].astype(float).std() for config in configs)
    assert sharp > 60
    assert blurred < 20


# From images to videos ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tree):
    """A spatial model and its losses, trained on the folder with every augmentation."""
    overrides = ["optim.lr=5e-3", "optim.lr_batch=null", "optim.warmup_epochs=1", "train.epochs=12", "optim.ema=0.5"]
    config = recipe(tree, *overrides, "augment.erasing=0.5", "augment.brightness=0.2", "data.crop_scale=[0.5, 1]")
    torch.manual_seed(0)
    model = posmlp.create_model(config.model.name, **config.model.overrides())
    learner = Learner(model, config, steps_per_epoch=1, class_names=tuple(COLOURS))
    losses = [learner.train_step(collated(config, epoch)).loss for epoch in range(config.train.epochs)]
    return config, learner, losses


def test_a_spatial_model_learns_from_images(trained):
    config, learner, _ = trained
    batch = collated(config, train=False)
    with learner.evaluation_weights():
        scores = learner.score(batch)
    assert scores.shape == (16, 1, 2)
    assert torch.equal(scores[:, 0].argmax(1), batch.labels)


@pytest.mark.parametrize("blocks", ["parallel", "joint"])
@pytest.mark.parametrize("place", ["folder", "memory://images"])
def test_its_safetensors_file_starts_a_video_model(trained, tmp_path, blocks, place):
    config, learner, _ = trained
    weights = learner.weights()
    uri = f"{tmp_path if place == 'folder' else place}/model.safetensors"
    if place == "folder":
        safetensors.torch.save_file(weights, uri)
    else:
        fsspec.filesystem("memory").pipe_file("/images/model.safetensors", safetensors.torch.save(weights))
    image = posmlp.create_model(config.model.name, **config.model.overrides()).eval()
    image.load_state_dict(weights)
    video = posmlp.create_model("tiny", frames=6, image_size=32, num_classes=5, blocks=blocks).eval()
    report = posmlp.load_published(video, uri)
    assert any("head: fresh" in line for line in report.adapted)
    clip = torch.randn(2, 3, 6, 32, 32)
    with torch.no_grad():
        of_video = video.features(clip)
        of_frames = [image.features(clip[:, :, [t]]) for t in range(6)]
    for stage, actual in enumerate(of_video):
        expected = torch.cat([maps[stage] for maps in of_frames], dim=2)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    fresh = posmlp.create_model("tiny", frames=6, image_size=32, num_classes=5, blocks=blocks).eval()
    with torch.no_grad():
        assert not torch.allclose(fresh.features(clip)[-1], of_video[-1], atol=1e-2)
