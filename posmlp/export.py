"""A trained model as one file that runs without this project: PyTorch's ``.pt2``, or ONNX.

The file takes decoded pictures as they are, uint8 ``[B, T, H, W, 3]``, and normalises them itself; B is free. What else
a user must know (class names, how to choose the frames) travels in it as JSON. It computes in fp32 by the reference,
``Block.add``: PyTorch's exporter does not enter ``posmlp.model.cpu``.
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

FORMATS = {".pt2": (), ".onnx": ("onnx", "onnxscript", "onnxruntime")}  # and the packages that each needs
ABOUT = "posmlp.json"  # the name of the JSON in a file of either format
BATCHES = (1, 3)  # checked; neither is the one that was traced
TOLERANCE, TOLERANCE_INT8 = 1e-4, 0.2  # largest difference from the model, as a share of its largest logit

Runner = Callable[[Tensor], Tensor]  # uint8 clips [B, T, H, W, 3] to float32 logits [B, classes]


@dataclass(frozen=True)
class Exported:
    """A file's content, and how it compares with the model on random clips.

    Attributes:
        difference: the largest between two logits.
        largest: absolute value of the model's logits.
        tolerance: share of ``largest`` that ``difference`` may be.
    """

    content: bytes
    difference: float
    largest: float
    tolerance: float

    @property
    def good(self) -> bool:
        """Whether the file computes what the model does. (A NaN is not good.)"""
        return self.difference <= self.tolerance * self.largest


class Recogniser(nn.Module):
    """A model with its preprocessing, in eval mode; a copy that shares nothing with the original.

    Blocks hold their ``linears``, which else are worked out from several parameters in each pass, and nothing more.
    """

    def __init__(self, model: PosMLPVideo, config: Config):
        super().__init__()
        self.config = config
        self.model = copy.deepcopy(model.member(model.own) if isinstance(model, Supernet) else model)
        self.eval().requires_grad_(False)
        for block in [module for module in self.modules() if isinstance(module, Block)]:
            made = {step: block.linears(step) for step in block.steps}
            block.linears = made.__getitem__  # type: ignore[assignment, method-assign]
            for unit in block.units.values():
                del unit.norm, unit.fc1, unit.fc2

    def forward(self, clips: Tensor) -> Tensor:
        """Logits, float32 ``[B, classes]``, of uint8 ``[B, T, H, W, 3]``."""
        return cast(Tensor, self.model(to_input(clips, self.config)))


def check_format(suffix: str, int8: bool) -> None:
    """Whether a file of this kind can be made here.

    Raises:
        UserError: the suffix is unknown, has no int8, or needs packages that are not installed.
    """
    if suffix not in FORMATS:
        raise UserError(f"unknown format {suffix!r}: expected a file that ends in {' or '.join(FORMATS)}")
    if int8 and suffix != ".onnx":
        raise UserError(f"--int8 makes ONNX files; expected a file that ends in .onnx, not {suffix}")
    if missing := [name for name in FORMATS[suffix] if importlib.util.find_spec(name) is None]:
        raise UserError(f"{suffix} files need {', '.join(missing)}: pip install {' '.join(missing)}")


def export(
    model: PosMLPVideo, config: Config, about: Mapping[str, Any], suffix: str, *, int8: bool = False
) -> Exported:
    """Trace a model, write it, load what was written anew, and compare the two.

    Args:
        model: on the CPU, in fp32 and eval mode; a supernet stands for its own architecture.
        config: the recipe, for the clip's shape and ``data.modality``.
        about: plain data to travel in the file.
        suffix: a key of ``FORMATS``.
        int8: hold the weights of blocks' linear layers as int8; their inputs are rounded to 8 bits too, as they come.

    Raises:
        UserError: as of ``check_format``.
    """
    check_format(suffix, int8)
    variant = config.model.variant()
    shape = (variant.frames, variant.image_size, variant.image_size, 3)
    recogniser, text = Recogniser(model, config), json.dumps(about)
    with torch.no_grad(), quiet():
        program = torch.export.export(
            recogniser,
            (torch.zeros(2, *shape, dtype=torch.uint8),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            # Some equations that always hold are too hard for the tracer. It asserts them instead of fixing the batch.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        content = as_torch(program, text) if suffix == ".pt2" else as_onnx(program, text, int8)
    runner, differences, largest = load(content, suffix), [], 0.0
    for batch in BATCHES:
        noise = torch.Generator().manual_seed(batch)
        clips = torch.randint(256, (batch, *shape), dtype=torch.uint8, generator=noise)
        with torch.no_grad():
            expected = model(to_input(clips, config))
        differences.append((runner(clips) - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    # Of several numbers max() may lose a NaN.
    difference = float(torch.tensor(differences).max())
    return Exported(content, difference, largest, TOLERANCE_INT8 if int8 else TOLERANCE)


def as_torch(program: torch.export.ExportedProgram, about: str) -> bytes:
    """A ``.pt2`` file."""
    program.example_inputs = None  # clips: tens of megabytes
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names places on this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={ABOUT: about})
    return buffer.getvalue()


def as_onnx(program: torch.export.ExportedProgram, about: str, int8: bool) -> bytes:
    """An ONNX file, weights included."""
    made = torch.onnx.export(
        program,
        input_names=["clips"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # names places on this machine
    model = quantised(model) if int8 else model
    model.metadata_props.add(key=ABOUT, value=about)
    return cast(bytes, model.SerializeToString())


def quantised(model: Any) -> Any:
    """An ONNX model whose linear layers multiply 8-bit integers (dynamic quantisation); each channel has a scale.

    ONNX Runtime takes constant weights on the right alone, ``[tokens, K] @ [K, M]``; here they are on the left, as
    tokens are channels first. So such a product is turned round first. The gates' products stay as they are.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph, turned = model.graph, dict[str, Any]()
    # [2C * units, C] or [C, C * units]; the transforms of joint gates, [2t-1, t] and [t, 2t-1], are no layers.
    layers = [
        tensor for tensor in graph.initializer if len(tensor.dims) == 2 and max(tensor.dims) % min(tensor.dims) == 0
    ]
    matrices = {tensor.name: tensor for tensor in layers}
    nodes = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[0] not in matrices:
            nodes.append(node)
            continue
        name, (weight, x), (out,) = f"linear_{len(turned)}", node.input, node.output
        turned[name] = onnx.numpy_helper.to_array(matrices[weight]).T
        nodes += [
            onnx.helper.make_node("Transpose", [x], [f"{name}_x"], perm=[1, 0]),
            onnx.helper.make_node("MatMul", [f"{name}_x", f"{name}_weight"], [f"{name}_out"], name),
            onnx.helper.make_node("Transpose", [f"{name}_out"], [out], perm=[1, 0]),
        ]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    kept += [onnx.numpy_helper.from_array(weight.copy(), f"{name}_weight") for name, weight in turned.items()]
    for field, content in ((graph.node, nodes), (graph.initializer, kept), (graph.value_info, [])):
        values = [copy.deepcopy(each) for each in content]  # they go with the field's old content
        del field[:]
        field.extend(values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8, nodes_to_quantize=list(turned))
        return onnx.load(path)


def load(content: bytes, suffix: str, threads: int | None = None) -> Runner:
    """What a file computes, as its users would run it: by ``torch.export.load``, or ONNX Runtime on the CPU.

    Args:
        threads: of ONNX Runtime; None: as PyTorch. (A ``.pt2`` file always has PyTorch's.)
    """
    if suffix == ".pt2":
        module = torch.export.load(io.BytesIO(content)).module()

        def run_torch(clips: Tensor) -> Tensor:
            with torch.no_grad():
                return cast(Tensor, module(clips))

        return run_torch
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' remarks about themselves and about packages that they can do without are kept from the user."""
    logger, root = logging.getLogger("torch.onnx"), logging.getLogger()
    levels = logger.level, root.level
    logger.setLevel(logging.ERROR)
    root.setLevel(logging.ERROR)  # of ONNX Runtime's quantiser
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(levels[0])
        root.setLevel(levels[1])
