"""Load weights into a model, from checkpoints of the published release, of this project, or of any trainer.

``load_published`` finds the model's tensors in a checkpoint, renames the release's tensors, makes channel groups
contiguous, and adapts differences between the checkpoint and the model: number of classes, window, clip length, and a
missing time axis (image -> video).
"""

from __future__ import annotations

import itertools
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from posmlp import storage
from posmlp.errors import UserError
from posmlp.model.backbone import PosMLPVideo
from posmlp.model.gates import PositionGate
from posmlp.model.spec import UNITS, Window
from posmlp.model.weight_files import UnusableTensor, WeightFileError, named_tensors, read_weight_file

State = dict[str, Tensor]

MAX_LISTED = 4  # problems in a message; a checkpoint of another variant has hundreds
COUNTER = "num_batches_tracked"  # of a batch norm; not needed

# Keys of entries that hold the state of an optimizer: its moments have the names and shapes of the weights.
OPTIMIZER_KEY = re.compile(r"(\w*_)?optim(izer)?s?(_\w*)?|opt|(max_)?exp_avg(_sq)?s?|momentum(_buffers?)?")

# Entries or prefixes of evaluation weights, which are preferred to others that fit as well. MMEngine's ema_state_dict
# is not one: its hook swaps the two, so that state_dict has the average.
EVALUATION_KEY = re.compile(r"weights|(.*_)?(ema|swa|averaged|teacher)(_(model|weights))?")

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # may be in the middle of a name
HEADS = ("head", "heads", "cls_head", "fc", "classifier", "projection")  # first parts of the names of other heads


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not fit the model. The message names the file and what is wrong."""


@dataclass(frozen=True)
class LoadReport:
    """Result of ``load_published``.

    Attributes:
        loaded: number of tensors taken from the checkpoint.
        adapted: one sentence for each adaptation. Without any, the model is the checkpoint's.
        choice: which of several equally fitting models of the checkpoint was taken; empty if there was one.
        normalisation: the value of ``data.normalisation`` that the model was trained with, ``slowfast`` for a video
            model of the published release; None if the tensors do not tell.
    """

    loaded: int
    adapted: tuple[str, ...]
    choice: str = ""
    normalisation: str | None = None


class Fit(NamedTuple):
    """How well the tensors under a prefix fit a model; of two, the larger one fits better.

    Attributes:
        fitting: number of tensors that have a name and a size of the model's.
        named: number of tensors that have a name of the model's.
        surplus: number of all other tensors, negative.
    """

    fitting: int
    named: int
    surplus: int


def load_published(model: PosMLPVideo, path_or_state_dict: str | Path | Mapping[str, object]) -> LoadReport:
    """Load a published checkpoint (or one saved from ``model.state_dict()``) into ``model``, in place.

    The weights may lie in any nesting of dicts and lists, under any keys, next to any other content. Their names may
    have any prefix (``module.``, ``model.``, ``_orig_mod.``, ``backbone.``). Those that fit the model best are loaded;
    of several that fit equally well, an average (EMA). Optimizer states are not searched.

    Differences are adapted as follows:

    - Number of classes, or no head in the checkpoint: the model keeps its own fresh head.
    - Window or clip length: position tables and token biases are resized (``resize_offsets``).
    - An image checkpoint, which has spatial units only, for a video model: temporal units start as no-ops, and a joint
      unit starts as the spatial unit within each frame. The features of each frame then equal those of the image model.
      Spatial units of blocks that have temporal units alone are left out.

    Args:
        model: any variant.
        path_or_state_dict: a file of ``torch.save`` or safetensors, as a path or URI; or its content. No code from the
            file is run.

    Raises:
        CheckpointError: the file cannot be read, holds no tensors or would run code; or tensors are missing, extra,
            misshapen beyond the adaptations above, or not finite. The model is then unchanged.
        FileNotFoundError: there is no such file.
    """
    state, report = fit_published(model, path_or_state_dict)
    model.load_state_dict(state, strict=False)
    return report


def fit_published(
    model: PosMLPVideo, path_or_state_dict: str | Path | Mapping[str, object]
) -> tuple[State, LoadReport]:
    """Read a checkpoint and adapt it to ``model``, as ``load_published`` does, without loading it.

    Args:
        model: is not changed. It may be on the meta device: then its own tensors take no memory.

    Returns:
        The tensors to load, and what was adapted.

    Raises:
        CheckpointError, FileNotFoundError: as ``load_published``.
    """
    if isinstance(path_or_state_dict, str | Path):
        source_name = storage.without_password(str(path_or_state_dict))
        content = read_file(str(path_or_state_dict))
    else:
        source_name, content = "the checkpoint", path_or_state_dict
    try:
        return fit_content(model, content)
    except CheckpointError as error:
        raise CheckpointError(f"{source_name} {error}") from error


def fit_content(model: PosMLPVideo, content: object) -> tuple[State, LoadReport]:
    """Adapt the content of a checkpoint to ``model``. The messages of errors continue after the checkpoint's name."""
    target = model.state_dict()
    expected = {k for k in target if not k.endswith(COUNTER)}
    found, choice = find_state({k: x for k, x in target.items() if k in expected}, content)
    source, adapted = canonical(found), list[str]()
    loaded = len(source)
    loaded -= extend_to_time(model, source, adapted)
    resize_windows(model, source, adapted)
    loaded -= replace_head(source, target, adapted)
    problems = [f"missing: {k} {list(target[k].shape)}" for k in sorted(expected - source.keys())]
    problems += [f"extra: {k} {list(source[k].shape)}" for k in sorted(source.keys() - expected)]
    problems += [
        f"wrong shape: {k} is {list(source[k].shape)}, expected {list(target[k].shape)}"
        for k in sorted(expected & source.keys())
        if source[k].shape != target[k].shape
    ]
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise CheckpointError(
            f"does not fit the model ({count}); expected a checkpoint of the same variant:\n  "
            + "\n  ".join(problems[:MAX_LISTED] + more)
        )
    return source, LoadReport(loaded, tuple(adapted), choice, trained_normalisation(found))


def read_file(uri: str) -> object:
    """Content of a PyTorch or safetensors file, on the CPU.

    Raises:
        CheckpointError: the file cannot be read, is of another kind, is damaged, or would run code.
        FileNotFoundError: there is no such file.
    """
    name = storage.without_password(uri)
    try:
        if not storage.is_remote(uri) and not storage.parquet_row(uri):
            return read_weight_file(storage.local_path(uri))
        with tempfile.NamedTemporaryFile(prefix="weights-") as copy:  # mapped into memory, so that there is one copy
            copy.write(storage.read_bytes(uri))
            copy.flush()
            return read_weight_file(copy.name)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise CheckpointError(f"{name}: cannot be read ({reason}); expected a file of weights") from error
    except WeightFileError as error:
        raise CheckpointError(f"{name}: {error}") from error


# --- the model's tensors in a checkpoint -------------------------------------------------------------------------


def find_state(target: Mapping[str, Tensor], content: object) -> tuple[State, str]:
    """Find the tensors of a model in the content of a checkpoint.

    The prefix is chosen, with all keys that lead to the tensors, under which most tensors have the names and sizes of
    the model's.

    Args:
        target: the model's tensors by name; only names and shapes matter.
        content: nested containers with tensors.

    Returns:
        The tensors by name, in this project's names or the release's; and the choice, as in ``LoadReport``.

    Raises:
        CheckpointError: there are none, or one of them is not dense, of floating point and finite.
    """
    tensors = {unwrapped_name(name): x for name, x in named_tensors(content, is_optimizer_key)}
    if not tensors:
        raise CheckpointError(
            "holds no named tensors outside of optimizer states; expected the model's state_dict, at any place in it"
        )
    prefixes = rank_prefixes(target, tensors)
    prefix = prefixes[0][0] if prefixes else ""
    chosen = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    if not prefixes or 2 * prefixes[0][1].named < min(len(target), len(chosen)):
        raise CheckpointError(
            f"is of another architecture: it holds {first_names(tensors)}; expected {first_names(target)}"
        )
    names = {our_name(name) for name in chosen}
    for end in range(prefix.count(".")):  # a backbone may have its head next to it, outside of the prefix
        outer = "".join(f"{part}." for part in prefix.split(".")[:end])
        chosen |= {
            inner: x
            for name, x in tensors.items()
            if name.startswith(outer) and our_name(inner := name.removeprefix(outer)) in target.keys() - names
        }
    refuse_unusable(target, chosen, prefix)
    equal = [other.rstrip(".") for other, fit in prefixes[1:] if fit == prefixes[0][1]]
    choice = f"weights: {prefix.rstrip('.')}; the checkpoint also has {', '.join(equal)}" if equal else ""
    if "head.weight" not in chosen and "head.bias" not in chosen:
        chosen = {name: x for name, x in chosen.items() if name.partition(".")[0] not in HEADS}
    return {name: x for name, x in chosen.items() if isinstance(x, Tensor) and not name.endswith(COUNTER)}, choice


def rank_prefixes(
    target: Mapping[str, Tensor], tensors: Mapping[str, Tensor | UnusableTensor]
) -> list[tuple[str, Fit]]:
    """Rank the prefixes under which tensors have names of the model's, the best first."""
    sizes: dict[str, set[int]] = {}
    for name, x in target.items():
        sizes.setdefault(common_name(name), set()).add(x.numel())
    roots = re.compile(r"patch_embed\d|blocks\d|" + "|".join({name.partition(".")[0] for name in target}))
    fitting, named = Counter[str](), Counter[str]()
    for name, tensor in tensors.items():
        parts = name.split(".")
        for i, part in enumerate(parts):
            common = common_name(our_name(".".join(parts[i:]))) if roots.fullmatch(part) else ""
            if common in sizes:
                prefix = "".join(f"{part}." for part in parts[:i])
                named[prefix] += 1
                fitting[prefix] += isinstance(tensor, Tensor) and tensor.numel() in sizes[common]

    def rank(item: tuple[str, Fit]) -> tuple[Fit, bool]:
        return item[1], any(EVALUATION_KEY.fullmatch(part) for part in item[0].split("."))

    needed = [name for name in tensors if not name.endswith(COUNTER)]
    fits = {p: Fit(fitting[p], named[p], named[p] - sum(name.startswith(p) for name in needed)) for p in named}
    return sorted(fits.items(), key=rank, reverse=True)  # the sort is stable: of equals the first in the file


def first_names(tensors: Mapping[str, object]) -> str:
    """The first names of tensors and their number, for messages."""
    return f"{', '.join(itertools.islice(tensors, 3))} ... ({len(tensors)} tensors)"


def is_optimizer_key(key: str) -> bool:
    """Return whether an entry of a checkpoint is the state of an optimizer."""
    return bool(OPTIMIZER_KEY.fullmatch(key))


def unwrapped_name(name: str) -> str:
    """A tensor's name without the parts that wrappers of modules add in the middle of names."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def common_name(name: str) -> str:
    """A name without the kind of unit and the number of groups, in which a checkpoint may differ from the model."""
    name = re.sub(rf"\.units\.({'|'.join(UNITS)})\.", ".units.", name)
    return re.sub(r"\.gate\.tables?(\.\d+)?$", ".gate.table", name)


def refuse_unusable(target: Mapping[str, Tensor], state: Mapping[str, Tensor | UnusableTensor], prefix: str) -> None:
    """Refuse tensors that are not dense, of floating point and finite.

    Args:
        prefix: of the names in the checkpoint, for the message.

    Raises:
        CheckpointError: names the first one.
    """
    names, damaged = {common_name(name) for name in target}, []
    for name, tensor in state.items():
        kind = tensor_kind(tensor)
        integer = isinstance(tensor, Tensor) and not tensor.is_floating_point() and not kind
        if kind or (integer and common_name(our_name(name)) in names):
            what = f"{kind} tensor" if kind else f"tensor of {str(tensor.dtype).removeprefix('torch.')}"  # type: ignore[union-attr]
            raise CheckpointError(f"cannot be used: {prefix}{name} is a {what}; expected dense floating-point numbers")
        if not integer and (bad := count_infinite(tensor)):  # type: ignore[arg-type]
            damaged.append(f"{prefix}{name} holds {bad} of {tensor.numel()} values that are NaN or infinite")  # type: ignore[union-attr]
    if damaged:
        more = f" (the first of {len(damaged)} such tensors)" if damaged[1:] else ""
        raise CheckpointError(f"cannot be used: {damaged[0]}{more}; expected finite weights, use another checkpoint")


def tensor_kind(tensor: Tensor | UnusableTensor) -> str:
    """Why a tensor is not dense numbers in memory; empty if it is."""
    if isinstance(tensor, UnusableTensor):
        return tensor.kind
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested:
        return "nested"
    if tensor.is_meta:
        return "meta"
    return "" if tensor.layout == torch.strided else "sparse"


def count_infinite(tensor: Tensor) -> int:
    """Number of values that are NaN or infinite, as float32 numbers if the tensor has another type."""
    return tensor.numel() - int(torch.isfinite(tensor.detach().float()).sum())


# --- the release's names and channel order -----------------------------------------------------------------------

RELEASE_NAMES = (
    (r"patch_embed1\.", "stem."),
    (r"patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"blocks(\d)\.(\d+)\.fc\.encoder\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.units.spatial."),
    (r"blocks(\d)\.(\d+)\.t_fc\.encoder\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.units.temporal."),
    (r"gate_unit\.pos\.token_proj_n_bias$", "gate.bias"),
    (r"gate_unit\.pos\.window_relative_position_bias_table$", "gate.table"),
)


def our_name(name: str) -> str:
    """A tensor's name in this project; one that is not of the release is returned unchanged."""
    for pattern, replacement in RELEASE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def is_release(state: State) -> bool:
    """Return whether a state has the release's names."""
    return any(name.startswith(("patch_embed", "blocks")) for name in state)


def trained_normalisation(state: State) -> str | None:
    """``data.normalisation`` of a state's training, as in ``LoadReport``; the release's image models had another."""
    return "slowfast" if is_release(state) and any(".t_fc." in name for name in state) else None


def canonical(state: State) -> State:
    """Convert a state to this project's names and channel order; one that has them already is returned unchanged."""
    if not is_release(state):
        return dict(state)
    out: State = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            continue  # the release stores its position index; here it is computed
        name = our_name(name)
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

    A tensor whose size is not divisible is returned unchanged, so that the caller reports its shape.
    """
    if x.ndim <= dim or groups < 1 or x.shape[dim] % (parts * groups):
        return x
    x = x.unflatten(dim, (parts, x.shape[dim] // (parts * groups), groups))
    return x.transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


# --- adaptations -------------------------------------------------------------------------------------------------


def replace_head(source: State, target: State, adapted: list[str]) -> int:
    """Give ``source`` the model's own head if it has none, or one for another number of classes, in place.

    Returns:
        The number of replaced tensors.
    """
    head, fresh = source.get("head.weight"), target["head.weight"]
    if head is None and "head.bias" not in source:
        adapted.append("head: fresh, as the checkpoint has none")
    elif head is not None and head.shape != fresh.shape and head.shape[1:] == fresh.shape[1:]:
        adapted.append(f"head: fresh, as the checkpoint has {len(head)} classes and the model {len(fresh)}")
    else:
        return 0
    replaced = len({"head.weight", "head.bias"} & source.keys())
    source |= {"head.weight": target["head.weight"], "head.bias": target["head.bias"]}
    return replaced


def extend_to_time(model: PosMLPVideo, source: State, adapted: list[str]) -> int:
    """Complete an image checkpoint ``source`` for the temporal and joint units of ``model``, in place.

    Returns:
        The number of tensors of spatial units that are left out.
    """
    if any(".units.temporal." in k or ".units.joint." in k for k in source):
        return 0
    fresh, temporal, joint, left_out = model.state_dict(), 0, 0, list[str]()
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
        if list(units) == ["temporal"]:
            left_out += [k for k in source if k.startswith(f"{name}.units.spatial.")]
    for key in left_out:
        del source[key]
    if temporal:
        adapted.append(
            f"{temporal} temporal units: no-ops at the start (fc2 = 0), as the checkpoint is an image model's"
        )
    if joint:
        adapted.append(f"{joint} joint units: the image model's spatial unit in each frame at the start")
    if left_out:
        count = sum(key.endswith(".gate.table") for key in left_out)
        adapted.append(f"{count} spatial units of the image model: left out, as their blocks have only temporal ones")
    return len(left_out)


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
