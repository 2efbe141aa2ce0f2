"""The logits of boxes against a plain loop over boxes, bins and samples, and the stride of stage 4."""

import io
import math
from itertools import product

import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks import plain
from posmlp import create_model
from tests.unit.model.test_model import PaddedUnit, logits, random_model

BOXES = torch.tensor([[0.1, 0.2, 0.45, 0.9], [-0.1, 0.5, 0.3, 1.1], [0, 0, 1, 1], [0.6, 0.1, 0.65, 0.15]]).double()
BOX_CLIP = torch.tensor([1, 0, 1, 1])


def bilinear(plane, y, x):
    """The value at a place in cells, where a cell's value lies at its centre: [C] of [C, H, W]."""
    sides = plane.shape[1:]
    if not all(-1 <= at <= side for at, side in zip((y, x), sides, strict=True)):
        return torch.zeros_like(plane[:, 0, 0])
    y, x = (min(max(at, 0.0), side - 1) for at, side in zip((y, x), sides, strict=True))
    total = 0
    for row, column in product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        weight = (1 - abs(y - row)) * (1 - abs(x - column))
        if weight > 0:
            total = total + weight * plane[:, row, column]
    return total


def bins_of(low, high, size):
    """For each bin of an axis, the places of its samples."""
    step, count = (high - low) / size, math.ceil((high - low) / size)
    return [[low + step * (p + (k + 0.5) / count) - 0.5 for k in range(count)] for p in range(size)]


def box_logits(model, clip, boxes, box_clip, stride):
    """The head as a loop, on the tokens that the plain model has after its norm."""
    reference, kept = plain.PlainModel(model).eval(), []
    reference.norm.register_forward_hook(lambda module, given, out: kept.append(out.detach()))
    logits(reference, clip)
    (tokens,) = kept
    height, width = (-(-side // stride) for side in clip.shape[3:])
    maps = tokens.view(len(clip), clip.shape[2], height, width, -1).mean(1).permute(0, 3, 1, 2)
    found = []
    for (x1, y1, x2, y2), number in zip(boxes.tolist(), box_clip.tolist(), strict=True):
        rows, columns = bins_of(y1 * height, y2 * height, 7), bins_of(x1 * width, x2 * width, 7)
        bins = [
            torch.stack([bilinear(maps[number], y, x) for y, x in product(ys, xs)]).mean(0)
            for ys, xs in product(rows, columns)
        ]
        found.append(model.head(torch.stack(bins).amax(0)))
    return torch.stack(found).detach()


@pytest.mark.parametrize("stride", [32, 16])
@pytest.mark.parametrize("size", [(4, 64, 64), (5, 65, 130), (1, 320, 200)], ids=["own", "wide", "long"])
def test_the_logits_of_boxes_equal_a_plain_loop(monkeypatch, size, stride):
    monkeypatch.setattr(plain, "PlainUnit", PaddedUnit)
    model = random_model(stage4_stride=stride)
    clip = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = box_logits(model, clip, BOXES, BOX_CLIP, stride)
    assert expected.std(0).min() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(model(clip, BOXES, BOX_CLIP), expected, rtol=0, atol=1e-10)


def test_boxes_without_their_clips_are_refused():
    with pytest.raises(ValueError, match="box_clip"):
        random_model()(torch.zeros(1, 3, 4, 64, 64).double(), BOXES)


def test_every_parameter_learns_from_boxes():
    model = random_model().train()
    out = model(torch.randn(2, 3, 4, 64, 64, dtype=torch.float64), BOXES, BOX_CLIP)
    (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_supernet_scores_boxes_as_its_member():
    choices = {"depths": [[1, 2], [1, 2], [1], [1]]}
    torch.manual_seed(0)
    model = create_model("tiny", num_classes=7, choices=choices, stage4_stride=16).eval()
    clip, boxes = torch.randn(2, 3, 4, 64, 64), BOXES.float()
    member = create_model("tiny", num_classes=7, stage4_stride=16).eval()
    member.load_state_dict(model.member(model.own).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(clip, boxes, BOX_CLIP), member(clip, boxes, BOX_CLIP))
        assert model.features(clip)[-1].shape == (2, 64, 4, 4, 4)


def test_stride_16_has_the_same_weights_and_twice_the_resolution():
    usual, fine = random_model(), random_model(stage4_stride=16)
    fine.load_state_dict(usual.state_dict())
    clip = torch.randn(1, 3, 4, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        *first, usual_map = usual.features(clip)
        *same, fine_map = fine.features(clip)
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
        assert (usual_map.shape, fine_map.shape) == ((1, 64, 4, 2, 3), (1, 64, 4, 4, 6))
        # A convolution of stride 2 is every second output of the one of stride 1.
        before = usual.stages[3].downsample(first[2]), fine.stages[3].downsample(first[2])
        torch.testing.assert_close(before[0], before[1][:, :, :, ::2, ::2], rtol=0, atol=1e-12)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = create_model("tiny", num_classes=5, stage4_stride=16).eval()

    def forward(self, clip, boxes, box_clip):
        return self.model(clip, boxes, box_clip)


def test_a_detector_can_be_exported():
    """With any number of boxes, as PyTorch's program and as ONNX."""
    torch.manual_seed(0)
    detector, clip = Detector(), torch.randn(1, 3, 4, 64, 80)
    given = clip, BOXES[:2].float(), torch.zeros(2, dtype=torch.int64)
    count = torch.export.Dim("boxes")
    with torch.no_grad():
        program = torch.export.export(detector, given, dynamic_shapes=(None, {0: count}, {0: count}))
        boxes, box_clip = BOXES.float(), torch.zeros(4, dtype=torch.int64)
        expected = detector(clip, boxes, box_clip)
        torch.testing.assert_close(program.module()(clip, boxes, box_clip), expected, rtol=0, atol=1e-5)
        names = ["clip", "boxes", "box_clip"]
        content = io.BytesIO()
        torch.onnx.export(program, input_names=names, dynamo=True, verbose=False).save(content)
    session = onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])
    feed = {name: each.numpy() for name, each in zip(names, (clip, boxes, box_clip), strict=True)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected, rtol=0, atol=1e-4)
