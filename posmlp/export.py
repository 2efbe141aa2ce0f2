"""Export a trained model as one file that runs without this project: PyTorch's ``.pt2``, or ONNX.

The file takes decoded frames, uint8 ``[B, T, H, W, 3]`` with any B, and normalises them itself. That of a detection
model also takes boxes, any number of them, and scores these. Whatever else a user must know (class names, how to choose
the frames) is in the file as JSON. The file computes in fp32 by the reference path of ``Block.run_step``, because
PyTorch's exporter does not use ``posmlp.model.cpu``.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.model.backbone import Block, PosMLPVideo
from posmlp.model.supernet import Supernet
from posmlp.video.augment import to_input

FORMATS = {".pt2": (), ".onnx": ("onnx", "onnxscript", "onnxruntime")}  # suffix -> packages that it needs
METADATA_NAME = "posmlp.json"  # of the JSON in a file of either format
# Of each task: the names of a file's inputs, and of the axis that is free in each.
INPUTS = {"recognition": {"clips": "batch"}, "detection": {"clips": "batch", "boxes": "boxes", "box_clip": "boxes"}}
TRACED = 2, 3  # clips and boxes
COMPARED = (1, 1), (3, 5)  # clips and boxes that the model and the file get; other numbers than those traced
TOLERANCE, TOLERANCE_INT8 = 1e-4, 0.2  # largest accepted difference from the model, relative to its largest logit

# Of recognition: uint8 clips [B, T, H, W, 3] -> float32 logits [B, classes].
# Of detection: clips, float32 boxes [N, 4], int64 box_clip [N] -> float32 logits [N, classes].
Runner = Callable[..., Tensor]


@dataclass(frozen=True)
class Exported:
    """Content of an exported file, and its comparison with the model on random clips and boxes.

    Attributes:
        content: the file's bytes.
        difference: largest absolute difference between a logit of the file and of the model.
        largest: largest absolute value of the model's logits.
        tolerance: largest accepted ``difference``, relative to ``largest``.
    """

    content: bytes
    difference: float
    largest: float
    tolerance: float

    @property
    def matches_model(self) -> bool:
        """Return whether the file's logits are within the tolerance. False for NaN."""
        return self.difference <= self.tolerance * self.largest


class WholeModel(nn.Module):
    """A model with its preprocessing, in eval mode; a copy that shares nothing with the original.

    Blocks hold only their merged ``linears``, which a model otherwise computes from several parameters in each pass.
    """

    def __init__(self, model: PosMLPVideo, config: Config):
        super().__init__()
        self.config = config
        self.model = copy.deepcopy(model.member(model.own) if isinstance(model, Supernet) else model)
        self.eval().requires_grad_(False)
        for block in [module for module in self.modules() if isinstance(module, Block)]:
            merged = {step: block.linears(step) for step in block.steps}
            block.linears = merged.__getitem__  # type: ignore[assignment, method-assign]
            for unit in block.units.values():
                del unit.norm, unit.fc1, unit.fc2

    def forward(self, clips: Tensor, boxes: Tensor | None = None, box_clip: Tensor | None = None) -> Tensor:
        """Logits, float32 ``[B, classes]`` or with boxes ``[N, classes]``, of uint8 clips ``[B, T, H, W, 3]``.

        Args:
            boxes, box_clip: as of ``PosMLPVideo.forward``.
        """
        return cast(Tensor, self.model(to_input(clips, self.config), boxes, box_clip))


def check_format(suffix: str, int8: bool) -> None:
    """Check that a file of this format can be written on this machine.

    Raises:
        UserError: the suffix is unknown, has no int8, or needs packages that are not installed.
    """
    if suffix not in FORMATS:
        raise UserError(f"unknown format {suffix!r}: expected a file that ends in {' or '.join(FORMATS)}")
    if int8 and suffix != ".onnx":
        raise UserError(f"--int8 writes ONNX files; expected a file that ends in .onnx, not {suffix}")
    if missing := [name for name in FORMATS[suffix] if importlib.util.find_spec(name) is None]:
        raise UserError(f"{suffix} files need {', '.join(missing)}: pip install {' '.join(missing)}")


def export(
    model: PosMLPVideo, config: Config, metadata: Mapping[str, Any], suffix: str, *, int8: bool = False
) -> Exported:
    """Trace a model, write it to bytes, load those bytes, and compare the result with the model.

    The size of a clip is fixed: the model's frames, and its square. The number of clips is free, and that of boxes.

    Args:
        model: on the CPU, in fp32 and eval mode; of a supernet, its own architecture is exported.
        config: the recipe, for the task, the clip's shape, ``data.normalisation`` and ``data.modality``.
        metadata: plain data to store in the file.
        suffix: a key of ``FORMATS``.
        int8: store the weights of the blocks' linear layers as int8; their inputs are quantised to 8 bits at run time.

    Raises:
        UserError: as for ``check_format``.
    """
    check_format(suffix, int8)
    whole, text, axes = WholeModel(model, config), json.dumps(metadata), INPUTS[config.task]
    free = {"batch": torch.export.Dim("batch", min=1), "boxes": torch.export.Dim("boxes", min=0)}
    with torch.no_grad(), silence_exporters():
        program = torch.export.export(
            whole,
            random_inputs(config, *TRACED),
            dynamic_shapes=tuple({0: free[axis]} for axis in axes.values()),
            # The tracer cannot prove some equations that always hold: assert them instead of fixing the batch size.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        content = to_pt2(program, text) if suffix == ".pt2" else to_onnx(program, text, axes, int8)
    runner, differences, largest = load_exported(content, suffix), [], 0.0
    for numbers in COMPARED:
        clips, *boxes = random_inputs(config, *numbers)
        with torch.no_grad():
            expected = model(to_input(clips, config), *boxes)
        differences.append((runner(clips, *boxes) - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    # Python's max() may lose a NaN, torch's does not.
    difference = float(torch.tensor(differences).max())
    return Exported(content, difference, largest, TOLERANCE_INT8 if int8 else TOLERANCE)


def random_inputs(config: Config, clips: int, boxes: int) -> tuple[Tensor, ...]:
    """Noise in the shapes of a file's inputs, always the same for the same numbers of clips and boxes."""
    variant, noise = config.model.variant(), torch.Generator().manual_seed(clips)
    shape = (clips, variant.frames, variant.image_size, variant.image_size, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=noise)
    if config.task == "recognition":
        return (pixels,)
    ends = torch.rand(boxes, 2, 2, generator=noise).sort(1).values  # the two ends of each box along x and y
    return pixels, ends.flatten(1), torch.arange(boxes) % clips


def to_pt2(program: torch.export.ExportedProgram, metadata: str) -> bytes:
    """Content of a ``.pt2`` file; ``metadata`` is JSON."""
    program.example_inputs = None  # the traced clips, tens of megabytes
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_NAME: metadata})
    return buffer.getvalue()


def to_onnx(program: torch.export.ExportedProgram, metadata: str, axes: Mapping[str, str], int8: bool) -> bytes:
    """Content of an ONNX file, weights included; ``metadata`` is JSON and ``axes`` a value of ``INPUTS``."""
    exported = torch.onnx.export(
        program,
        input_names=[*axes],
        output_names=["logits"],
        dynamic_shapes=tuple({0: axis} for axis in axes.values()),
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # contains paths of this machine
    model = quantise(model) if int8 else model
    model.metadata_props.add(key=METADATA_NAME, value=metadata)
    return cast(bytes, model.SerializeToString())


def quantise(model: Any) -> Any:
    """Make an ONNX model's linear layers multiply 8-bit integers (dynamic quantisation, one scale per channel).

    ONNX Runtime accepts constant weights only on the right, ``[tokens, K] @ [K, M]``. Here they are on the left, as
    tokens are stored channels first, so these products are transposed first. The gates' products are not changed.

    Weights use 7 of the 8 bits. Processors without VNNI add two products of 8 bits in 16 bits, and cut larger sums; two
    products of 255 * 64 fit (ONNX Runtime, "Quantize ONNX models", on ``reduce_range``).
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph, transposed = model.graph, dict[str, Any]()
    # [2C * units, C] or [C, C * units]; the Fourier transforms of joint gates are [2t-1, t] and [t, 2t-1].
    layers = [
        tensor for tensor in graph.initializer if len(tensor.dims) == 2 and max(tensor.dims) % min(tensor.dims) == 0
    ]
    matrices = {tensor.name: tensor for tensor in layers}
    nodes = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[0] not in matrices:
            nodes.append(node)
            continue
        name, (weight, x), (out,) = f"linear_{len(transposed)}", node.input, node.output
        transposed[name] = onnx.numpy_helper.to_array(matrices[weight]).T
        nodes += [
            onnx.helper.make_node("Transpose", [x], [f"{name}_x"], perm=[1, 0]),
            onnx.helper.make_node("MatMul", [f"{name}_x", f"{name}_weight"], [f"{name}_out"], name),
            onnx.helper.make_node("Transpose", [f"{name}_out"], [out], perm=[1, 0]),
        ]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    kept += [onnx.numpy_helper.from_array(weight.copy(), f"{name}_weight") for name, weight in transposed.items()]
    for field, content in ((graph.node, nodes), (graph.initializer, kept), (graph.value_info, [])):
        values = [copy.deepcopy(each) for each in content]  # clearing the field deletes the originals
        del field[:]
        field.extend(values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        quantize_dynamic(
            model,
            path,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(transposed),
        )
        return onnx.load(path)


def load_exported(content: bytes, suffix: str, threads: int | None = None) -> Runner:
    """Load an exported file as its users do: with ``torch.export.load``, or with ONNX Runtime on the CPU.

    Args:
        content: the file's bytes.
        suffix: a key of ``FORMATS``.
        threads: threads of ONNX Runtime; None: as many as PyTorch uses. (A ``.pt2`` file always uses PyTorch's.)
    """
    if suffix == ".pt2":
        module = torch.export.load(io.BytesIO(content)).module()

        def run_torch(*inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return cast(Tensor, module(*inputs))

        return run_torch
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run_onnx(*inputs: Tensor) -> Tensor:
        arrays = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return run_onnx


def load_exported_file(path: str) -> tuple[nn.Module, dict[str, Any]]:
    """Load a ``.pt2`` file that this module wrote: its module, called as a ``Runner``, and its metadata."""
    extra = {METADATA_NAME: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return module, json.loads(extra[METADATA_NAME])


@contextmanager
def silence_exporters() -> Iterator[None]:
    """Hide the exporters' warnings about themselves and about optional packages."""
    logger, root = logging.getLogger("torch.onnx"), logging.getLogger()
    levels = logger.level, root.level
    logger.setLevel(logging.ERROR)
    root.setLevel(logging.ERROR)  # ONNX Runtime's quantiser logs there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(levels[0])
        root.setLevel(levels[1])
