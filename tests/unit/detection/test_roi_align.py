"""RoIAlign against ONNX Runtime's operator, and what training and export need of it."""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from posmlp.detection.roi_align import roi_align


def reference(maps, boxes, box_clip, size):
    """ONNX's RoiAlign (opset 16) in fp32."""
    names = ("maps", "boxes", "index")
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64)
    node = helper.make_node(
        "RoiAlign",
        names,
        ["out"],
        mode="avg",
        output_height=size,
        output_width=size,
        sampling_ratio=0,
        spatial_scale=1.0,
        coordinate_transformation_mode="half_pixel",
    )
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, kinds, strict=True)]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    opset = [helper.make_opsetid("", 16)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=opset, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    height, width = maps.shape[2:]
    cells = boxes * torch.tensor([width, height, width, height])
    feed = dict(zip(names, (each.numpy() for each in (maps, cells, box_clip)), strict=True))
    return torch.from_numpy(session.run(None, feed)[0])


def random_boxes(count, seed=0):
    """Of any size up to the picture's, and partly outside of it."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.rand(count, 2, generator=generator) * 0.98 + 0.01
    corner = torch.rand(count, 2, generator=generator) * 1.6 - 0.6
    return torch.cat([corner, corner + extent], 1)


@pytest.mark.parametrize("size", [1, 7, 8])
@pytest.mark.parametrize("shape", [(7, 7), (14, 14), (8, 11), (2, 3), (1, 1), (40, 23)])
def test_equals_onnx_runtime(shape, size):
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(3, 5, *shape, generator=generator)
    boxes = random_boxes(200)
    assert (boxes.min() < -0.1) and (boxes.max() > 1.1)
    box_clip = torch.randint(3, (200,), generator=generator)
    expected = reference(maps, boxes, box_clip, size)
    assert expected.std() > 0.05
    torch.testing.assert_close(roi_align(maps, boxes, box_clip, size), expected, rtol=0, atol=2e-5)


def test_the_whole_picture_of_a_map_of_that_size_is_the_map():
    maps = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    torch.testing.assert_close(roi_align(maps, boxes, torch.tensor([1, 0])), maps.flip(0), rtol=0, atol=1e-12)


def test_a_ramp_keeps_its_values():
    """The average of a linear function over a bin is its value at the bin's centre."""
    x = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    maps = (2 * x + 3 * x[:16, None]).expand(1, 1, 16, 20)
    (found,) = roi_align(maps, torch.tensor([[0.2, 0.25, 0.8, 0.75]]), torch.tensor([0]), 4)
    across = 0.2 + 0.6 * (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    down = (0.25 + 0.5 * (torch.arange(4, dtype=torch.float64) + 0.5) / 4) * 16 / 20
    torch.testing.assert_close(found[0], 2 * across + 3 * down[:, None], rtol=0, atol=1e-6)


def test_a_box_without_area_and_no_box_at_all():
    maps = torch.full((1, 2, 5, 5), 3.0)
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    torch.testing.assert_close(roi_align(maps, point, torch.tensor([0])), torch.full((1, 2, 7, 7), 3.0))
    none = roi_align(maps, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0, 2, 7, 7)


def test_gradient_by_finite_differences():
    maps = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    boxes, box_clip = random_boxes(6).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    assert torch.autograd.gradcheck(lambda m: roi_align(m, boxes, box_clip, 3), (maps,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_give_half_precision(dtype):
    maps, boxes, box_clip = torch.rand(1, 3, 14, 14), random_boxes(20).clamp(0, 1), torch.zeros(20, dtype=torch.int64)
    found = roi_align(maps.to(dtype), boxes, box_clip)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), roi_align(maps, boxes, box_clip), rtol=0.02, atol=0.02)


class Align(torch.nn.Module):
    def forward(self, maps, boxes, box_clip):
        return roi_align(maps, boxes, box_clip)


def exported():
    """Traced with 5 boxes on 2 maps; any number of both may follow."""
    example = torch.rand(2, 3, 8, 11), random_boxes(5), torch.tensor([0, 1, 1, 0, 1])
    clips, count = torch.export.Dim("clips"), torch.export.Dim("boxes")
    return torch.export.export(Align(), example, dynamic_shapes=({0: clips}, {0: count}, {0: count}))


def test_torch_export():
    maps, boxes, box_clip = torch.rand(4, 3, 8, 11), random_boxes(9), torch.arange(9) % 4
    buffer = io.BytesIO()
    torch.export.save(exported(), buffer)
    found = torch.export.load(io.BytesIO(buffer.getvalue())).module()(maps, boxes, box_clip)
    torch.testing.assert_close(found, roi_align(maps, boxes, box_clip))


def test_onnx_export():
    maps, boxes, box_clip = torch.rand(4, 3, 8, 11), random_boxes(9), torch.arange(9) % 4
    program = torch.onnx.export(
        exported(), input_names=["maps", "boxes", "index"], dynamo=True, verbose=False
    ).model_proto
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"maps": maps.numpy(), "boxes": boxes.numpy(), "index": box_clip.numpy()}
    (found,) = session.run(None, feed)
    np.testing.assert_allclose(found, roi_align(maps, boxes, box_clip).numpy(), rtol=0, atol=1e-5)


def test_no_value_is_read_on_the_host():
    """A meta tensor has no values."""
    meta = torch.empty(2, 3, 8, 11, device="meta"), torch.empty(4, 4, device="meta")
    found = roi_align(*meta, torch.empty(4, device="meta", dtype=torch.int64))
    assert found.shape == (4, 3, 7, 7)
