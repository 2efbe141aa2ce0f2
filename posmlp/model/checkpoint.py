"""Load weights into a model, from checkpoints of the published release or of this project.

``load_published`` renames the release's tensors, makes channel groups contiguous, and adapts differences between the
checkpoint and the model: number of classes, window, clip length, and a missing time axis (image -> video).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from posmlp import storage
from posmlp.errors import UserError
from posmlp.model.backbone import PosMLPVideo
from posmlp.model.gates import PositionGate
from posmlp.model.spec import Window

State = dict[str, Tensor]


class CheckpointError(UserError):
    """A checkpoint that does not fit the model; the message lists missing, extra and misshapen keys."""


@dataclass(frozen=True)
class LoadReport:
    """Result of ``load_published``.

    Attributes:
        loaded: number of tensors taken from the checkpoint.
        adapted: one sentence for each adaptation.
    """

    loaded: int
    adapted: tuple[str, ...]


def load_published(model: PosMLPVideo, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Load a published checkpoint (or one saved from ``model.state_dict()``) into ``model``, in place.

    Differences are adapted as follows:

    - Number of classes: the model keeps its own fresh head.
    - Window or clip length: position tables and token biases are resized (``resize_offsets``).
    - An image checkpoint, which has spatial units only, for a video model: temporal units start as no-ops, and a joint
      unit starts as the spatial unit within each frame. The features of each frame then equal those of the image model.

    Args:
        model: any variant.
        path_or_state_dict: a PyTorch file (read with ``weights_only=True``) or a safetensors file, as a path or URI; or
            a mapping from names to tensors. An entry ``weights``, ``model`` or ``state_dict`` is unwrapped, and
            ``module.`` prefixes are dropped.

    Raises:
        CheckpointError: the file holds no tensors or is unsafe to read, or keys are missing, extra or misshapen beyond
            the adaptations above. The model is then unchanged.
        FileNotFoundError: there is no such file.
    """
    source = canonical(read_state(path_or_state_dict))
    adapted: list[str] = []
    target = model.state_dict()
    source = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    loaded = len(source)
    extend_to_time(model, source, adapted)
    resize_windows(model, source, adapted)
    head, fresh = source.get("head.weight"), target["head.weight"]
    if head is not None and head.shape != fresh.shape and head.shape[1:] == fresh.shape[1:]:
        adapted.append(f"head: fresh, as the checkpoint has {len(head)} classes and the model {len(fresh)}")
        loaded -= len({"head.weight", "head.bias"} & source.keys())
        source |= {"head.weight": target["head.weight"], "head.bias": target["head.bias"]}
    expected = {k for k in target if not k.endswith("num_batches_tracked")}
    problems = [f"missing: {k} {list(target[k].shape)}" for k in sorted(expected - source.keys())]
    problems += [f"extra: {k} {list(source[k].shape)}" for k in sorted(source.keys() - expected)]
    problems += [
        f"wrong shape: {k} is {list(source[k].shape)}, expected {list(target[k].shape)}"
        for k in sorted(expected & source.keys())
        if source[k].shape != target[k].shape
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model ({len(problems)} problems; is it of another variant?):\n  "
            + "\n  ".join(problems)
        )
    model.load_state_dict(source, strict=False)
    return LoadReport(loaded=loaded, adapted=tuple(adapted))


def read_state(path_or_state_dict: str | Path | Mapping[str, Tensor]) -> State:
    """Tensors of a checkpoint by name, unwrapped. Runs no code from the file; a path may be a URI."""
    content: object = path_or_state_dict
    if isinstance(path_or_state_dict, str | Path):
        content = read_tensors(str(path_or_state_dict))
    for wrapper in ("weights", "model", "state_dict"):  # the first: evaluation weights of a run of this project
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError("the checkpoint holds no named tensors and has no entry weights, model or state_dict")
    return {str(k).removeprefix("module."): v for k, v in content.items()}


def read_tensors(uri: str) -> object:
    """Content of a PyTorch or safetensors file, on the CPU.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds more than plain data and tensors.
        FileNotFoundError: there is no such file.
    """
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{uri}: cannot be read ({error}); expected a file of weights") from error
    try:
        # In a safetensors file, 8 bytes of length come before the JSON header. No PyTorch file has { at that place.
        if content[8:9] == b"{":
            return safetensors.torch.load(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of a damaged file can fail anywhere, with any type of error
        raise CheckpointError(
            f"{uri}: damaged, or not a checkpoint that holds only tensors; nothing was loaded: {error}"
        ) from error


# --- the release's names and channel order -----------------------------------------------------------------------

RELEASE_NAMES = (
    (r"patch_embed1\.", "stem."),
    (r"patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"blocks(\d)\.(\d+)\.fc\.encoder\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.units.spatial."),
    (r"blocks(\d)\.(\d+)\.t_fc\.encoder\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.units.temporal."),
    (r"gate_unit\.pos\.token_proj_n_bias$", "gate.bias"),
    (r"gate_unit\.pos\.window_relative_position_bias_table$", "gate.table"),
)


def canonical(state: State) -> State:
    """Convert a state to this project's names and channel order; one that has them already is returned unchanged."""
    if not any(k.startswith(("patch_embed", "blocks")) for k in state):
        return dict(state)
    out: State = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            continue  # the release stores its position index; here it is computed
        for pattern, replacement in RELEASE_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".gate." in name:
            tensor = tensor.flatten() if name.endswith("bias") else tensor.T if tensor.ndim == 2 else tensor
        if "proj" in name and tensor.ndim == 4:
            tensor = tensor.unsqueeze(2)  # an image model's Conv2d
        out[name] = tensor
    for name in [k for k in out if k.endswith("gate.table")]:
        unit, groups = name.removesuffix("gate.table"), len(out[name]) if out[name].ndim == 2 else 1
        for key, dim, parts in (("fc1.weight", 0, 2), ("fc1.bias", 0, 2), ("fc2.weight", 1, 1)):  # fc1 makes u and v
            if unit + key in out:
                out[unit + key] = contiguous_groups(out[unit + key], dim, parts, groups)
    return out


def contiguous_groups(x: Tensor, dim: int, parts: int, groups: int) -> Tensor:
    """Make channel groups along ``dim`` contiguous in each of its ``parts``; in the release, group(c) is c mod S.

    A tensor that does not divide is returned unchanged, so that the caller reports its shape.
    """
    if x.ndim <= dim or groups < 1 or x.shape[dim] % (parts * groups):
        return x
    x = x.unflatten(dim, (parts, x.shape[dim] // (parts * groups), groups))
    return x.transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


# --- adaptations -------------------------------------------------------------------------------------------------


def extend_to_time(model: PosMLPVideo, source: State, adapted: list[str]) -> None:
    """Complete an image checkpoint ``source`` for the temporal and joint units of ``model``, in place."""
    if any(".units.temporal." in k or ".units.joint." in k for k in source):
        return
    fresh, temporal, joint = model.state_dict(), 0, 0
    for name, block in model.named_modules():
        units = getattr(block, "units", {})
        if "temporal" in units and f"{name}.units.spatial.gate.table" in source:
            temporal += 1
            for key in (k for k in fresh if k.startswith(f"{name}.units.temporal.")):
                source[key] = torch.zeros_like(fresh[key]) if ".fc2." in key else fresh[key]
        if "joint" in units and f"{name}.units.spatial.gate.table" in source:
            joint += 1
            for key in [k for k in source if k.startswith(f"{name}.units.spatial.")]:
                source[key.replace(".spatial.", ".joint.")] = source.pop(key)
    if temporal:
        adapted.append(
            f"{temporal} temporal units: no-ops at the start (fc2 = 0), as the checkpoint is an image model's"
        )
    if joint:
        adapted.append(f"{joint} joint units: the image model's spatial unit in each frame at the start")


def resize_windows(model: PosMLPVideo, source: State, adapted: list[str]) -> None:
    """Fit every table and token bias of ``source`` to the windows of ``model``, in place."""
    for name, gate in model.named_modules():
        if not isinstance(gate, PositionGate) or not {f"{name}.table", f"{name}.bias"} <= source.keys():
            continue
        table, bias = source[f"{name}.table"], source[f"{name}.bias"]
        window = source_window(table.shape[1], bias.numel(), gate.window) if table.ndim == 2 else None
        if window is None or window == gate.window:
            continue
        if window[0] == 1 and gate.window[0] > 1:  # table of an image model: time steps do not mix at the start
            static = table.new_zeros(len(table), 2 * gate.window[0] - 1, table.shape[1])
            static[:, gate.window[0] - 1] = table
            table, bias = static.flatten(1), bias.repeat(gate.window[0])
            window = (gate.window[0], *window[1:])
        if window != gate.window:
            adapted.append(f"{name}: window {window} resized to {gate.window}")
            table, bias = resize_offsets(table, window, gate.window), resize_tokens(bias, window, gate.window)
        source[f"{name}.table"], source[f"{name}.bias"] = table, bias


def source_window(offsets: int, tokens: int, like: Window) -> Window | None:
    """Find the window of a table with ``offsets`` entries and a bias with ``tokens`` entries; None if none fits.

    A window that differs from ``like`` along one axis is preferred to a square one.
    """
    candidates = [like, (tokens // math.prod(like[1:]), *like[1:])]
    if like[1:] != (1, 1):
        if 1 in like[1:]:
            t, h, w = (tokens // like[0] if axis and side > 1 else side for axis, side in enumerate(like))
            candidates.append((t, h, w))  # of a unit that mixes only one of height and width
        sides = range(1, math.isqrt(tokens) + 1)
        candidates += [(tokens // n**2, n, n) for n in sides if tokens % n**2 == 0]
    fits = (w for w in candidates if math.prod(w) == tokens and math.prod(2 * n - 1 for n in w) == offsets)
    return next(fits, None)


def resize_offsets(table: Tensor, window: Window, new: Window) -> Tensor:
    """Resize position tables ``[S, offsets]`` from ``window`` to ``new``, trilinearly in the relative offset.

    The farthest offsets map to the farthest offsets, and offset 0 to offset 0. The gate sums over the window's tokens,
    so entries are scaled by old tokens / new tokens: a clip of twice the frames then mixes to the same values.
    """
    maps = table.view(len(table), 1, *(2 * n - 1 for n in window))
    size = [2 * n - 1 for n in new]
    resized = F.interpolate(maps, size=size, mode="trilinear", align_corners=True)
    return resized.reshape(len(table), -1) * (math.prod(window) / math.prod(new))


def resize_tokens(bias: Tensor, window: Window, new: Window) -> Tensor:
    """Resize a token bias ``[tokens]`` from ``window`` to ``new``, trilinearly in the position."""
    return F.interpolate(bias.view(1, 1, *window), size=list(new), mode="trilinear", align_corners=True).flatten()
