"""Augmentation on the device, against Pillow, closed forms, and the same batch split into micro-batches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from posmlp.config import load_recipe
from posmlp.errors import UserError
from posmlp.video import augment
from posmlp.video.augment import color_jitter, cut_box, flip_labels, send, symmetric_beta, to_input, to_train_input
from posmlp.video.batch import Batch
from posmlp.video.randaugment import (
    AFFINE_OPERATIONS,
    OPERATIONS,
    AugmentOperation,
    Pass,
    affine_map,
    draw_operations,
    enhancement_factor,
    plan_passes,
    randaugment,
)
from posmlp.video.random_bits import normals, random_bits, uniforms
from posmlp.video.sampling import Box

OFF = ("data.modality=rgb", "augment.brightness=0", "augment.contrast=0", "augment.saturation=0")
KINDS = {
    "flip": ["augment.flip=0.5"],
    "jitter": ["augment.brightness=0.3", "augment.contrast=0.3", "augment.saturation=0.3"],
    "randaugment": ["augment.randaug_layers=4"],
    "erasing": ["augment.erasing=0.5"],
    "mixup": ["augment.mixup=0.8"],
    "cutmix": ["augment.cutmix=1"],
    "difference": ["data.modality=rgb_difference"],
}
# Mean and deviation of ImageNet's pixels in 0..1, R, G, B: those of torchvision's published models.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = torch.arange(10)  # no class turns into another


def recipe(*overrides):
    """The demo recipe without its augmentation, plus overrides or augmentations named in ``KINDS``."""
    chosen = [override for kind in overrides for override in KINDS.get(kind, [kind])]
    return load_recipe("demo", [*OFF, "train.global_batch=24", *chosen])


def make_batch(count=8, seed=0, frames=3, height=14, width=12):
    """Clips with some structure: noise with few levels over a gradient."""
    rng = np.random.default_rng(seed)
    clips = rng.integers(0, 60, (count, frames, height, width, 3)) + np.arange(width)[:, None] * (180 // width)
    return Batch(
        clips=torch.from_numpy(clips.astype(np.uint8)),
        labels=torch.arange(count) % 10,
        weights=torch.ones(count),
        seeds=torch.from_numpy(rng.integers(0, 2**63 - 1, count)),
    )


def flat_batch(count, frames=2, height=8, width=8, seed=0):
    """Clip i has the level i % 256 everywhere, and class i % 10."""
    levels = (torch.arange(count) % 256).byte().view(-1, 1, 1, 1, 1)
    seeds = torch.arange(count) + 1000 * seed
    clips = levels.expand(-1, frames, height, width, 3).contiguous()
    return Batch(clips, torch.arange(count) % 10, torch.ones(count), seeds)


def part(batch, start, stop):
    return Batch(*(getattr(batch, k)[start:stop] for k in ("clips", "labels", "weights", "seeds")))


def levels(x):
    """Undo the normalisation: model input to 0..255."""
    std, mean = (torch.tensor(v).view(3, 1, 1, 1) for v in (STD, MEAN))
    return (x * std + mean) * 255


# ---------------------------------------------------------------- plain input


def test_input_is_normalised_and_laid_out():
    clips = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8)
    x = to_input(clips, recipe())
    expected = (clips.numpy() / 255.0 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(x.numpy(), expected.transpose(0, 4, 1, 2, 3), atol=1e-5)


def test_the_normalisation_of_the_published_code():
    config = recipe("data.normalisation=slowfast")
    batch = make_batch()
    expected = (batch.clips.numpy().transpose(0, 4, 1, 2, 3) / 255.0 - 0.45) / 0.225
    np.testing.assert_allclose(to_input(batch.clips, config).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(to_train_input(batch, config, CLASSES)[0].numpy(), expected, atol=1e-5)


def test_known_pixels_have_the_values_that_published_models_expect():
    """Black and white, with the numbers by channel that (pixel - mean) / deviation gives."""
    clips = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 2, 3, 3, 3)
    black, white = to_input(clips, recipe())[:, :, 0, 0, 0]
    torch.testing.assert_close(black, torch.tensor([-2.117904, -2.035714, -1.804444]))
    torch.testing.assert_close(white, torch.tensor([2.248908, 2.428571, 2.640000]))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 2, 3, 3, 3)
    found = to_input(red, recipe())[0, :, 1, 1, 1]
    torch.testing.assert_close(found, torch.tensor([2.248908, -2.035714, -1.804444]))


def test_rgb_difference_is_each_frame_minus_the_one_before():
    clips = torch.randint(0, 256, (2, 4, 5, 5, 3), dtype=torch.uint8)
    config = recipe("data.modality=rgb_difference")
    x = to_input(clips, config)
    expected = np.diff(clips.numpy() / 255.0, axis=1).transpose(0, 4, 1, 2, 3) / np.array(STD).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(x[:, :, 1:].numpy(), expected, atol=1e-5)
    assert torch.equal(x[:, :, 0], x[:, :, 1])
    assert not to_input(clips[:, :1].expand(-1, 4, -1, -1, -1), config).any()


def test_without_augmentation_training_sees_what_evaluation_sees():
    batch = make_batch()
    x, targets = to_train_input(batch, recipe(), CLASSES)
    assert torch.equal(x, to_input(batch.clips, recipe()))
    assert torch.equal(targets, F.one_hot(batch.labels, 10).float())


# ---------------------------------------------------------------- RandAugment


def pillow(image, operation):
    """Apply the operation with Pillow, with the arguments that timm passes at that strength."""
    s, amount, enhance = operation.strength, abs(operation.strength), enhancement_factor(operation.strength)
    width, height = image.size
    how = {"resample": Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}

    def transform(*coefficients):
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, **how)

    match operation.name:
        case "autocontrast" | "equalize" | "invert":
            return getattr(ImageOps, operation.name)(image)
        case "posterize":
            bits = 4 - int(amount * 4)
            return ImageOps.posterize(image, bits) if bits else image.point([0] * 768)  # Pillow refuses 0
        case "solarize":
            return ImageOps.solarize(image, 256 - int(amount * 256))
        case "solarize_add":
            return image.point([min(255, i + int(amount * 110)) if i < 128 else i for i in range(256)] * 3)
        case "rotate":
            return image.rotate(30 * s, **how)
        case "shear_x":
            return transform(1, 0.3 * s, 0, 0, 1, 0)
        case "shear_y":
            return transform(1, 0, 0, 0.3 * s, 1, 0)
        case "translate_x":
            return transform(1, 0, 0.45 * s * width, 0, 1, 0)
        case "translate_y":
            return transform(1, 0, 0, 0, 1, 0.45 * s * height)
        case name:
            return getattr(ImageEnhance, name.capitalize())(image).enhance(enhance)


def applied(clips, operations):
    """The clips after each clip's operations."""
    passes = plan_passes(operations, *clips.shape[-2:])
    sent = iter(send([array for each in passes for array in each[1:]], clips.device))
    result = clips.clone(memory_format=torch.contiguous_format)
    randaugment(result, [Pass(each.function, next(sent), next(sent)) for each in passes])
    return result


def drawn(seeds, layers, magnitude):
    """The operations of some seeds."""
    numbers = uniforms(random_bits(torch.tensor(seeds), 1)[:, 0], 4 * layers)
    return draw_operations(numbers.unflatten(1, (layers, 4)), magnitude)


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=30)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    span=st.tuples(st.integers(0, 255), st.integers(0, 255)),
    strength=st.floats(-1, 1),
    seed=st.integers(0, 1000),
)
def test_operations_equal_pillows(name, size, span, strength, seed):
    """On a clip of two frames. Operations that read the whole picture get both frames as one tall picture."""
    if min(size) < 3 and name == "sharpness":
        return  # Pillow smooths nothing smaller, and neither do we, but it blends in other steps
    rng = np.random.default_rng(seed)
    frames = rng.integers(min(span), max(span) + 1, (2, *size, 3)).astype(np.uint8)
    operation = AugmentOperation(name, strength)
    if name in (*AFFINE_OPERATIONS, "sharpness"):
        expected = np.stack([np.asarray(pillow(Image.fromarray(frame), operation)) for frame in frames])
    else:
        expected = np.asarray(pillow(Image.fromarray(frames.reshape(-1, size[1], 3)), operation)).reshape(frames.shape)
    clip = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).unsqueeze(0).contiguous()
    got = applied(clip, [[operation]])[0].permute(1, 2, 3, 0).numpy()
    off = np.abs(got.astype(int) - expected)
    if name in AFFINE_OPERATIONS:
        off = off[:, ~at_the_border(affine_map(operation, *size), *size)]
    assert off.max(initial=0) <= 1


def at_the_border(coefficients, height, width):
    """Pixels ``[H, W]`` whose source is so near the frame's border that rounding decides whether it is inside."""
    a, b, c, d, e, f = coefficients
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    sources = ((a * x + b * y + c, width), (d * x + e * y + f, height))
    return np.any([np.abs(at - edge) < 1e-4 for at, side in sources for edge in (0, side)], axis=0)


def test_strengths_are_those_of_the_increasing_set():
    """Magnitude 0 changes least, 10 most."""
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 3, 1, 16, 16)
    others = ("rotate", "solarize", "solarize_add", "color", "contrast", "brightness", "sharpness")
    for name in (*others, *AFFINE_OPERATIONS):
        assert torch.equal(applied(ramp, [[AugmentOperation(name, 0.0)]]), ramp), name
    assert len(applied(ramp, [[AugmentOperation("posterize", 0.0)]]).unique()) == 16
    assert not applied(ramp, [[AugmentOperation("posterize", 1.0)]]).any()
    assert torch.equal(applied(ramp, [[AugmentOperation("solarize", 1.0)]]), 255 - ramp)
    assert (enhancement_factor(1.0), enhancement_factor(-1.0)) == (1.9, pytest.approx(0.1))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), clips=st.integers(2, 6), layers=st.integers(1, 3))
def test_clips_of_a_batch_get_their_own_operations(seed, clips, layers):
    """All together as each alone, whichever of them share a pass."""
    rng = np.random.default_rng(seed)
    batch = torch.from_numpy(rng.integers(0, 256, (clips, 3, 2, 9, 7)).astype(np.uint8))
    operations = drawn(rng.integers(0, 2**62, clips).tolist(), layers, 7.0)
    alone = [applied(batch[i : i + 1], operations[i : i + 1]) for i in range(clips)]
    assert torch.equal(applied(batch, operations), torch.cat(alone))


def test_operations_follow_the_stated_distribution():
    everything = [s for clip in drawn(range(2000), 4, 7.0) for s in clip]
    applied = [s for s in everything if s is not None]
    assert len(applied) / len(everything) == pytest.approx(0.5, abs=0.03)
    shares = np.unique([s.name for s in applied], return_counts=True)[1] / len(applied)
    assert len(shares) == 15
    assert shares == pytest.approx(1 / 15, abs=0.015)
    strengths = np.array([s.strength for s in applied])
    assert np.abs(strengths).mean() == pytest.approx(0.7, abs=0.005)
    assert np.abs(strengths).std() == pytest.approx(0.05, abs=0.005)
    assert (strengths > 0).mean() == pytest.approx(0.5, abs=0.03)
    assert stats.kstest(np.abs(strengths), stats.norm(0.7, 0.05).cdf).pvalue > 0.01
    assert max(abs(s.strength) for clip in drawn(range(200), 4, 10.0) for s in clip if s) == 1.0


@given(st.integers(0, 2**63 - 1))
def test_layers_and_magnitude_do_not_shift_each_others_draws(seed):
    def names(layers, magnitude):
        return [s and s.name for s in drawn([seed], layers, magnitude)[0]]

    assert names(2, 9.0) == names(4, 3.0)[:2]


# ---------------------------------------------------------------- the whole of it


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.sets(st.sampled_from(sorted(KINDS))),
    repeats=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
    bad=st.sets(st.integers(0, 7), max_size=2),
)
def test_two_workers_make_the_same_clips_as_one(chosen, repeats, seed, bad):
    """A batch that is split between pairs of videos gives exactly the same clips."""
    config = recipe(f"data.repeats={repeats}", *chosen)
    batch = make_batch(8, seed)
    batch.weights[list(bad)] = 0
    x, targets = to_train_input(batch, config, CLASSES)
    again, same = to_train_input(batch, config, CLASSES)
    assert torch.equal(x, again)
    assert torch.equal(targets, same)
    for size in (2 * repeats, 4):
        parts = [to_train_input(part(batch, i, i + size), config, CLASSES) for i in range(0, 8, size)]
        assert torch.equal(x, torch.cat([p[0] for p in parts]))
        assert torch.equal(targets, torch.cat([p[1] for p in parts]))


@settings(max_examples=20, deadline=None)
@given(chosen=st.sets(st.sampled_from(sorted(KINDS))), order=st.permutations(range(5)))
def test_a_clip_is_the_same_at_any_place_in_the_batch(chosen, order):
    """Bit for bit, and with frames whose noise ends within a vector of the processor."""
    config, batch = recipe(*chosen), make_batch(10, height=37, width=29)
    places = torch.tensor([2 * i + k for i in order for k in (0, 1)])
    moved = Batch(*(getattr(batch, k)[places] for k in ("clips", "labels", "weights", "seeds")))
    before, after = to_train_input(batch, config, CLASSES), to_train_input(moved, config, CLASSES)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[places], y)


def test_a_device_is_sent_one_array_and_asked_for_nothing():
    """On PyTorch's meta device, whose tensors have no values: whatever asks for one raises an error."""
    everything = set(KINDS) - {"difference"}
    batch, meta = make_batch(8), torch.device("meta")
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
                source = args[1] if function is torch.ops.aten.copy_.default else args[0]
                if source.device != result.device:
                    copies.append(source)
            return result

    there = Batch(batch.clips.to(meta), batch.labels.to(meta), batch.weights.to(meta), batch.seeds)
    config, flipped = recipe(*everything), CLASSES.to(meta)
    with Copies():
        x, y = to_train_input(there, config, flipped)
    assert (x.device, x.shape, y.shape) == (meta, (8, 3, 3, 14, 12), (8, 10))
    assert len(copies) == 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.sum().item()


def test_no_constant_is_made_on_the_device_from_values_of_the_host():
    """``torch.tensor(..., device=...)`` is a copy that the host waits for. On the CPU, as the meta device hides it."""
    made = []

    class Constants(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.lift_fresh.default:
                made.append(args[0])
            return function(*args, **(kwargs or {}))

    config = recipe(*(set(KINDS) - {"difference"}))
    batches = [make_batch(8, seed) for seed in range(4)]
    with Constants():
        for batch in batches:
            to_train_input(batch, config, CLASSES)
            to_input(batch.clips, config)
        assert made == []
        torch.tensor(1.0)
    assert len(made) == 1


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("difference", "flip")])
def test_another_seed_gives_another_clip(kind):
    config, batch = recipe(kind), make_batch(16)
    other = Batch(batch.clips, batch.labels, batch.weights, batch.seeds + 1)
    assert not torch.equal(to_train_input(batch, config, CLASSES)[0], to_train_input(other, config, CLASSES)[0])


@settings(max_examples=20, deadline=None)
@given(chosen=st.sets(st.sampled_from(sorted(set(KINDS) - {"erasing", "difference"}))), seed=st.integers(0, 2**31))
def test_equal_frames_stay_equal(chosen, seed):
    batch = make_batch(8, seed)
    still = Batch(batch.clips[:, :1].expand(-1, 3, -1, -1, -1), batch.labels, batch.weights, batch.seeds)
    x, _ = to_train_input(still, recipe(*chosen), CLASSES)
    assert torch.equal(x, x[:, :, :1].expand_as(x))


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "erasing"])
def test_one_augmentation_does_not_shift_anothers_numbers(kind):
    """A flip and less contrast do not change flat clips, so the other augmentations must give the same result."""
    batch = flat_batch(16)
    alone = to_train_input(batch, recipe(kind), CLASSES)
    more = to_train_input(batch, recipe(kind, "flip", "augment.contrast=0.5"), CLASSES)
    for a, b in zip(alone, more, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_mixing_commutes_with_the_frame_difference(mixing):
    batch, rest = make_batch(8), ("randaugment", "flip", mixing)
    rgb, _ = to_train_input(batch, recipe(*rest), CLASSES)
    difference, _ = to_train_input(batch, recipe(*rest, "difference"), CLASSES)
    torch.testing.assert_close(difference[:, :, 1:], rgb.diff(dim=2), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- flip


def test_a_flip_mirrors_the_clip_and_changes_its_label():
    batch = make_batch(400, frames=1, height=4, width=4)
    flipped = flip_labels({"2": "5"}, (), 10)
    plain = to_input(batch.clips, recipe())
    x, targets = to_train_input(batch, recipe("augment.flip=0.3"), flipped)
    turned = (x == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(turned, ~(x == plain).flatten(1).all(1))
    assert turned.float().mean().item() == pytest.approx(0.3, abs=0.08)
    swapped = {2: 5, 5: 2}
    labels = [swapped.get(int(c), int(c)) if t else int(c) for c, t in zip(batch.labels, turned, strict=True)]
    assert targets.argmax(1).tolist() == labels
    assert torch.equal(to_train_input(batch, recipe("augment.flip=1"), flipped)[0], plain.flip(-1))


def test_flip_classes_are_checked():
    names = ["left", "right", "up"]
    assert flip_labels({"left": "right"}, names, 4).tolist() == [1, 0, 2, 3]
    assert flip_labels({"left": "right", "right": "left", "up": "up"}, names, 3).tolist() == [1, 0, 2]
    assert flip_labels({}, (), 3).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"augment\.flip_classes.*'lefft' \(did you mean 'left'\?\)"):
        flip_labels({"lefft": "right"}, names, 3)
    with pytest.raises(UserError, match=r"augment\.flip_classes.*no class 'down'"):
        flip_labels({"up": "down"}, names, 3)
    with pytest.raises(UserError, match="cannot turn 'right' into 'left' and 'up'"):
        flip_labels({"left": "right", "up": "right"}, names, 3)
    with pytest.raises(UserError, match="no class '3'"):
        flip_labels({"3": "0"}, (), 3)


# ---------------------------------------------------------------- colour jitter


def test_each_colour_change_does_what_it_says():
    x = torch.randint(60, 180, (1, 3, 2, 8, 8), dtype=torch.uint8)
    plain = x.float() / 255
    grey = (plain * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)).sum(1, keepdim=True)

    def changed(**strengths):
        """Each factor is half-way between 1 and the largest."""
        config = recipe(*(f"augment.{k}={v}" for k, v in strengths.items())).augment
        factors = [1 + 0.5 * each for each in (config.brightness, config.contrast, config.saturation)]
        return color_jitter(x, torch.tensor([factors]), config)

    assert torch.equal(color_jitter(x, None, recipe().augment), plain)
    torch.testing.assert_close(changed(brightness=0.2), plain * 1.1)
    torch.testing.assert_close(changed(contrast=0.2), (plain - plain.mean()) * 1.1 + plain.mean())
    torch.testing.assert_close(changed(saturation=0.2), (plain - grey) * 1.1 + grey)
    both = plain * 1.1
    torch.testing.assert_close(changed(brightness=0.2, contrast=0.4), (both - both.mean()) * 1.2 + both.mean())
    assert changed(brightness=1).max() == 1


# ---------------------------------------------------------------- erasing


def test_erasing_fills_one_box_of_all_frames_with_noise():
    batch = flat_batch(200, frames=4, height=40, width=40)
    plain = to_input(batch.clips, recipe())
    x, targets = to_train_input(batch, recipe("augment.erasing=0.5"), CLASSES)
    assert torch.equal(targets, F.one_hot(batch.labels, 10).float())
    changed = (x != plain).all(1)  # [B, T, H, W]
    assert torch.equal(changed, (x != plain).any(1))
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    erased = changed.flatten(1).any(1)
    assert erased.float().mean().item() == pytest.approx(0.5, abs=0.12)
    areas = []
    for i in erased.nonzero()[:, 0]:
        rows, columns = changed[i, 0].any(1).nonzero()[:, 0], changed[i, 0].any(0).nonzero()[:, 0]
        h, w = (int(v[-1] - v[0] + 1) for v in (rows, columns))
        assert changed[i, 0].sum() == h * w  # a full rectangle
        assert 0.2 < w / h < 5  # 0.3..3.3, but for rounding
        areas.append(h * w / 1600)
        box = x[i][..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert not torch.equal(box[:, 0], box[:, 1])  # new noise in each frame
    assert 0.01 < min(areas) < 0.08
    assert 0.25 < max(areas) < 0.36
    noise = x[changed.unsqueeze(1).expand_as(x)]
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_colour_factors_are_uniform_between_their_bounds():
    config = recipe("augment.brightness=0.4", "augment.contrast=0.2", "augment.saturation=1").augment
    factors = augment.draw_parameters(torch.arange(4000), config, 8, 8, 1).arrays["factors"]
    for values, strength in zip(factors.T, (0.4, 0.2, 1.0), strict=True):
        assert stats.kstest(values, stats.uniform(1 - strength, 2 * strength).cdf).pvalue > 0.01
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.06


def test_the_erased_box_and_noise_of_a_seed_stay_the_same(monkeypatch):
    """The noise of a clip's 7th number as key, and the box that NumPy's generator draws from the 6th."""
    asked = []
    monkeypatch.setattr(
        augment, "random_resized_crop", lambda *given: asked.append((given[:4], given[4].random())) or Box(1, 2, 1, 2)
    )
    config = recipe("augment.erasing=1")
    seed = torch.tensor([1234567])
    keys = random_bits(seed, 7)[0].tolist()
    batch = Batch(torch.zeros(1, 1, 4, 5, 3, dtype=torch.uint8), torch.tensor([3]), torch.ones(1), seed)
    x, _ = to_train_input(batch, config, CLASSES)
    assert torch.equal(x[0, :, 0, 1, 2:4].flatten(), normals([keys[6]], [6], x.device))
    assert asked == [((4, 5, (0.02, 1 / 3), (0.3, 10 / 3)), np.random.default_rng(keys[5] % 2**64).random())]


def test_the_noise_of_one_clip_tells_nothing_of_anothers():
    """Between clips, channels and frames of seeds that follow each other."""
    batch = flat_batch(40, frames=2, height=16, width=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "random_resized_crop", lambda *_: Box(0, 0, 16, 16))
        x, _ = to_train_input(batch, recipe("augment.erasing=1"), CLASSES)
    planes = x.reshape(240, 256)  # of one channel of one frame
    off_diagonal = torch.corrcoef(planes)[~torch.eye(240, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 6 / 16  # 6 deviations
    assert (off_diagonal * 16).std().item() == pytest.approx(1, abs=0.02)
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.01


# ---------------------------------------------------------------- mixing


@pytest.mark.parametrize(
    ("share", "y", "x", "box"),
    [
        (0.25, 0.5, 0.5, Box(25, 13, 50, 24)),  # half of each side of 100 x 50, rounded to whole halves
        (0.25, 0.0, 0.99, Box(0, 37, 25, 13)),  # clipped at the top and on the right
        (0.25, 0.9, 0.1, Box(65, 0, 35, 17)),  # clipped at the bottom and on the left
        (0.04, 0.5, 0.5, Box(40, 20, 20, 10)),
        (1.0, 0.5, 0.5, Box(0, 0, 100, 50)),
        (0.0, 0.5, 0.5, Box(50, 25, 0, 0)),
    ],
)
def test_the_box_of_cutmix_has_the_share_of_the_frame_and_its_shape(share, y, x, box):
    assert cut_box(100, 50, share, y, x) == box


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_mixup_blends_pixels_and_labels_alike(repeats):
    batch, config = make_batch(12), recipe("augment.mixup=0.8", f"data.repeats={repeats}")
    batch = Batch(batch.clips, torch.arange(12) // repeats % 10, batch.weights, batch.seeds)
    flipped = torch.arange(12)
    plain = to_input(batch.clips, config)
    x, y = to_train_input(batch, config, flipped)
    for i in range(12):
        j = (i // repeats ^ 1) * repeats + i % repeats  # the same repeat of the neighbour
        kept = y[i, batch.labels[i]]
        assert 0 <= kept <= 1
        torch.testing.assert_close(y[i, batch.labels[j]], 1 - kept)
        torch.testing.assert_close(y[j, batch.labels[j]], kept)  # the pair shares one number
        torch.testing.assert_close(x[i], kept * plain[i] + (1 - kept) * plain[j])
    assert len(y.amax(1).unique()) > 2
    torch.testing.assert_close(y.sum(1), torch.ones(12))


@settings(max_examples=20, deadline=None)
@given(alpha=st.sampled_from([0.2, 1.0, 3.0]), size=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_cutmix_counts_the_pixels_that_it_swaps(alpha, size):
    batch = flat_batch(8, height=size[0], width=size[1])
    x, y = to_train_input(batch, recipe(f"augment.cutmix={alpha}"), CLASSES)
    values = levels(x).round()
    for i in range(8):
        own, other = values[i] == i, values[i] == i ^ 1
        assert (own | other).all()
        assert torch.equal(other, other[:1, :1].expand_as(other))  # one box for all channels and frames
        box = other[0, 0]
        assert box.sum() == box.any(1).sum() * box.any(0).sum()
        assert y[i, i].item() == pytest.approx(own.float().mean().item(), abs=1e-6)
        assert y[i, i ^ 1].item() == pytest.approx(other.float().mean().item(), abs=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0, 4.0])
def test_two_uniform_numbers_make_one_of_the_beta_distribution(alpha):
    """Against SciPy's distribution; the ends of the range give numbers too."""
    numbers = np.random.default_rng(0).random((20000, 2)).tolist()
    values = [symmetric_beta(alpha, u, v) for u, v in numbers]
    assert stats.kstest(values, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    for u, v in [(0.0, 0.0), (0.0, 0.25), (0.0, 0.5), (1 - 2**-53, 0.25), (0.5, 0.25), (2**-53, 1 - 2**-53)]:
        assert 0 <= symmetric_beta(alpha, u, v) <= 1


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_mixed_shares_follow_the_beta_distribution(alpha):
    batch = flat_batch(4000, frames=1, height=2, width=2)
    _, y = to_train_input(batch, recipe(f"augment.mixup={alpha}"), CLASSES)
    kept = y[::2].gather(1, batch.labels[::2, None]).double()
    assert kept.mean().item() == pytest.approx(0.5, abs=0.03)
    assert kept.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    x, y = to_train_input(flat_batch(2000, frames=1, height=40, width=40), recipe("augment.cutmix=1"), CLASSES)
    assert y[::2].amax(1).max() == 1
    assert (x != x.flatten(2)[..., :1, None, None]).flatten(1).any(1).float().mean() > 0.8


def test_with_both_methods_on_half_of_the_pairs_are_cut():
    batch = flat_batch(2000, frames=1, height=4, width=4)
    plain = to_input(batch.clips, recipe())
    x, _ = to_train_input(batch, recipe("augment.mixup=0.8", "augment.cutmix=1"), CLASSES)
    blended = (x != plain).flatten(1).all(1) & (x == x[..., :1, :1]).flatten(1).all(1)
    assert blended[::2].float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert torch.equal(blended[::2], blended[1::2])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("bad", [2, 3])
def test_padding_is_not_mixed(kind, bad):
    batch, config = flat_batch(8), recipe(kind)
    mixed, shares = to_train_input(batch, config, CLASSES)
    batch.weights[bad] = 0
    x, y = to_train_input(batch, config, CLASSES)
    plain = to_input(batch.clips, config)
    others = [0, 1, 4, 5, 6, 7]
    assert torch.equal(x[2:4], plain[2:4])
    assert torch.equal(y[2:4], F.one_hot(batch.labels[2:4], 10).float())
    assert torch.equal(x[others], mixed[others])
    assert torch.equal(y[others], shares[others])
