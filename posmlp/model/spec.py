"""Architectures as plain data: units, block types, variants and the checks on them. Imports neither PyTorch nor NumPy.

``UNITS`` and ``BLOCKS`` are the tables to extend: a new block type is one more entry in ``BLOCKS``, a new unit kind one
more entry in ``UNITS``. Everything else (model, cost, CPU and GPU paths, supernet, recipes) reads these tables.
``posmlp.create_model`` builds a model from a ``Variant``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from posmlp.errors import UserError

Window = tuple[int, int, int]  # tokens along time, height, width

STAGES = 4
INITS = ("published", "scaled")  # sizes of fresh weights

# Unit kind -> the axes of the stage's window whose tokens the unit mixes: t (time), h (height), w (width).
UNITS: dict[str, str] = {
    "temporal": "t",  # PoTGU
    "spatial": "hw",  # PoSGU
    "joint": "thw",  # PoSTGU
}

# Block type -> its residual steps, in order. The units of one step share one normalised input; their outputs are added.
# A unit kind may occur only once in a block, as it names the unit's weights.
BLOCKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "parallel": (("spatial", "temporal"),),  # the released block: x + PoSGU(x) + PoTGU(x)
    "cascade_ts": (("temporal",), ("spatial",)),
    "cascade_st": (("spatial",), ("temporal",)),
    "joint": (("joint",),),
    "spatial": (("spatial",),),  # the image model, and the ablation without time
    "temporal": (("temporal",),),  # the ablation without space: only stem and downsampling see neighbours in a frame
}


def unit_window(kind: str, window: Window) -> Window:
    """Window of a unit in a stage whose window is ``window``: 1 along each axis that the unit does not mix."""
    t, h, w = (n if axis in UNITS[kind] else 1 for axis, n in zip("thw", window, strict=True))
    return t, h, w


def block_units(block: str) -> tuple[str, ...]:
    """Unit kinds of a block type, in the order of its steps."""
    return tuple(kind for step in BLOCKS[block] for kind in step)


def residual_steps(blocks: Sequence[str], depths: Sequence[int]) -> int:
    """Number of residual steps from the stem to the head; one entry of the arguments for each stage."""
    return sum(len(BLOCKS[block]) * depth for block, depth in zip(blocks, depths, strict=True))


@dataclass(frozen=True)
class Architecture:
    """Block type, group count and depth of each stage: one member of a supernet."""

    blocks: tuple[str, ...]
    groups: tuple[int, ...]
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Choices:
    """The values that each stage of a supernet can take. An empty tuple means the variant's own value.

    Attributes:
        blocks, groups, depths: one tuple of candidate values for each stage.
    """

    blocks: tuple[tuple[str, ...], ...] = ((),) * STAGES
    groups: tuple[tuple[int, ...], ...] = ((),) * STAGES
    depths: tuple[tuple[int, ...], ...] = ((),) * STAGES

    def with_defaults(self, own: Architecture) -> Choices:
        """These choices, with the value of ``own`` wherever a stage has none."""
        return Choices(
            tuple(values or (value,) for values, value in zip(self.blocks, own.blocks, strict=True)),
            tuple(values or (value,) for values, value in zip(self.groups, own.groups, strict=True)),
            tuple(values or (value,) for values, value in zip(self.depths, own.depths, strict=True)),
        )

    def contains(self, architecture: Architecture) -> bool:
        """Return whether every stage of an architecture uses one of these values."""
        pairs = zip(asdict(self).values(), asdict(architecture).values(), strict=True)
        return all(value in values for every, chosen in pairs for values, value in zip(every, chosen, strict=True))


@dataclass(frozen=True)
class Variant:
    """Everything that defines a model. Each tuple has one entry per stage.

    Attributes:
        dims, depths, groups: channels, blocks and channel groups.
        windows: an int or a pair (h, w) is a window over all frames of the clip; a triple is (t, h, w).
        blocks: block types, keys of ``BLOCKS``; a single string applies to all stages.
        frames, image_size: the clip size that the windows and the cost refer to; the model accepts other sizes too.
        stage4_stride: pixels of the clip from one token of the last stage to the next. 16: the last stage has the
            resolution of the third, as detectors want it; the weights are the same.
        init: size of fresh weights, one of ``INITS``. ``published``: as the release. ``scaled``: by the width of a
            layer, the depth of the model and the size of a window (``posmlp.model.backbone.scale_init``).
        choices: if given, the model is a supernet: all architectures of these choices with shared weights
            (``posmlp.model.supernet``). In eval mode it runs as the variant's own blocks, groups and depths.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    groups: tuple[int, ...] = (8, 16, 32, 64)
    windows: tuple[int | tuple[int, ...], ...] = (14, 14, 14, 7)
    blocks: str | tuple[str, ...] = "parallel"
    frames: int = 16
    image_size: int = 224
    num_classes: int = 400
    drop_path: float = 0.0
    dropout: float = 0.0
    stage4_stride: int = 32
    init: str = "published"
    choices: Choices | None = None

    def architecture(self) -> Architecture:
        """Blocks, groups and depths of a variant that ``model_variant`` has checked."""
        return Architecture(cast(tuple[str, ...], self.blocks), self.groups, self.depths)

    def full_windows(self) -> list[Window]:
        """Window (t, h, w) of each stage."""
        windows: list[Window] = []
        for window in self.windows:
            spatial = (window, window) if isinstance(window, int) else tuple(window)
            t, h, w = (self.frames, *spatial)[-3:]
            windows.append((t, h, w))
        return windows


# s is the released Something-Something S/16. The release's b and l cannot be built: 392 channels are not divisible by
# 32 groups. Here b keeps the published depths and l is deeper; the widths of both are divisible.
VARIANTS = {
    "tiny": Variant(
        dims=(16, 32, 48, 64),
        depths=(1, 2, 1, 1),
        groups=(4, 8, 8, 16),
        windows=(8, 4, 4, 2),
        frames=4,
        image_size=64,
        init="scaled",
    ),
    "s": Variant(dims=(72, 144, 288, 576), depths=(3, 4, 9, 3)),
    "b": Variant(dims=(96, 192, 384, 768), depths=(4, 6, 15, 4)),
    "l": Variant(dims=(112, 224, 448, 896), depths=(4, 8, 21, 4)),
}
CLIP_LENGTHS = (8, 16, 32)  # frames; each makes a model name such as s16


def list_models() -> list[str]:
    """Model names for ``create_model``: a variant, or a variant with a clip length such as ``s16``."""
    return [*VARIANTS, *(f"{v}{frames}" for v in VARIANTS if v != "tiny" for frames in CLIP_LENGTHS)]


def model_variant(name: str, **overrides: Any) -> Variant:
    """Return the checked ``Variant`` of a named model with overrides; arguments and errors as for ``create_model``."""
    if name not in list_models():
        raise UserError(f"unknown model {name!r}{suggest(name, list_models())}; known: {', '.join(list_models())}")
    base = name.rstrip("0123456789")
    variant = VARIANTS[base]
    if name != base:
        variant = replace(variant, frames=int(name[len(base) :]))
    known = [f.name for f in fields(Variant)]
    if unknown := [key for key in overrides if key not in known]:
        hints = ", ".join(repr(key) + suggest(key, known) for key in unknown)
        raise UserError(f"unknown model override {hints}; known: {', '.join(known)}")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    variant = replace(variant, **plain)
    if isinstance(variant.blocks, str):
        variant = replace(variant, blocks=(variant.blocks,) * STAGES)
    if isinstance(variant.choices, Mapping):
        variant = replace(variant, choices=parse_choices(name, variant.choices))
    if problems := find_problems(variant):
        raise UserError(f"model {name!r} cannot be built: " + "; ".join(problems))
    return variant


def parse_choices(name: str, plain: Mapping[str, Any]) -> Choices:
    """Turn plain data into ``Choices``; ``name`` is the model's, for error messages.

    Raises:
        UserError: a key is unknown, or a value is not one list per stage.
    """
    known = [f.name for f in fields(Choices)]
    if unknown := [key for key in plain if key not in known]:
        raise UserError(f"model {name!r} cannot be built: choices of {unknown} are not known; known: {known}")
    for key, stages in plain.items():
        if not isinstance(stages, list | tuple) or not all(isinstance(values, list | tuple) for values in stages):
            raise UserError(f"model {name!r} cannot be built: choices of {key} {stages!r} must be one list per stage")
    return Choices(**{key: tuple(tuple(values) for values in stages) for key, stages in plain.items()})


def find_problems(variant: Variant) -> list[str]:
    """List the reasons why a variant cannot be built, one sentence each."""
    problems = []
    for key in ("dims", "depths", "groups", "windows", "blocks"):
        value = getattr(variant, key)
        if not isinstance(value, tuple):
            return [f"{key} {value!r} must be a list or tuple with an entry for each of {STAGES} stages"]
        if len(value) != STAGES:
            problems.append(f"{key} {value} has {len(value)} entries, expected one for each of {STAGES} stages")
    for key in ("dims", "depths", "groups"):
        if any(not isinstance(n, int) or n < 1 for n in getattr(variant, key)):
            problems.append(f"{key} {getattr(variant, key)} must be positive whole numbers")
    for window in variant.windows:
        sides = tuple(window) if isinstance(window, list | tuple) else (window, window)
        if len(sides) not in (2, 3) or any(not isinstance(n, int) or n < 1 for n in sides):
            problems.append(f"window {window!r} must be a positive number, (h, w) or (t, h, w)")
    problems += [f"unknown block type {b!r}{suggest(str(b), BLOCKS)}" for b in variant.blocks if b not in BLOCKS]
    for key in ("frames", "image_size", "num_classes"):
        value = getattr(variant, key)
        if not isinstance(value, int) or value < 1:
            problems.append(f"{key} {value!r} must be a positive whole number")
    for key in ("drop_path", "dropout"):
        value = getattr(variant, key)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            problems.append(f"{key} {value!r} must be at least 0 and less than 1")
    if variant.stage4_stride not in (16, 32):
        problems.append(f"stage4_stride {variant.stage4_stride!r} must be 32 or 16")
    if variant.init not in INITS:
        problems.append(f"init {variant.init!r} must be {' or '.join(INITS)}")
    if not problems:
        for i, (dim, groups) in enumerate(zip(variant.dims, variant.groups, strict=True), start=1):
            if dim % groups:
                problems.append(f"stage {i}: {dim} channels are not divisible by {groups} groups")
        if variant.dims[0] % 2:
            problems.append(f"stage 1: {variant.dims[0]} channels must be even, as the stem starts with half of them")
        if variant.choices:
            problems += choice_problems(variant, variant.choices)
    return problems


def choice_problems(variant: Variant, choices: Choices) -> list[str]:
    """List the reasons why choices do not fit a variant that is valid without them, one sentence each."""
    named = {"blocks": choices.blocks, "groups": choices.groups, "depths": choices.depths}
    problems = [
        f"choices of {key} have {len(stages)} entries, expected one for each of {STAGES} stages"
        for key, stages in named.items()
        if len(stages) != STAGES
    ]
    if problems:
        return problems
    for stage in range(STAGES):
        for key, stages in named.items():
            own: tuple[Any, ...] = getattr(variant, key)
            for value in stages[stage]:
                chosen: Any = {key: (*own[:stage], value, *own[stage + 1 :])}
                problems += find_problems(replace(variant, choices=None, **chosen))
            if stages[stage] and own[stage] not in stages[stage]:
                problems.append(f"stage {stage + 1}: the model's own {key} {own[stage]!r} is not in {stages[stage]}")
    return list(dict.fromkeys(problems))


def suggest(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    """Return a hint such as `` (did you mean 's16'?)``, or an empty string if nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
