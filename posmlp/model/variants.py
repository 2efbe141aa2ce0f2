"""Named variants of the backbone, and ``create_model``. A variant is plain data; overrides are what differs from it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from posmlp.errors import UserError
from posmlp.model.backbone import BLOCKS, PosMLPVideo
from posmlp.model.gates import Window
from posmlp.model.supernet import Architecture, Choices, Supernet

STAGES = 4


@dataclass(frozen=True)
class Variant:
    """Everything that defines a model. A tuple has one entry a stage.

    Attributes:
        dims, depths, groups: channels, blocks and channel groups.
        windows: an int or a pair (h, w) is a window over all frames of the clip, a triple (t, h, w) is explicit.
        blocks: block types (``posmlp.model.backbone.BLOCKS``); a single one serves all stages.
        frames, image_size: the clip that the windows and the cost are meant for; others work too.
        choices: not one model but all of these, with shared weights (``posmlp.model.supernet``); the variant's own
            blocks, groups and depths are what it runs as when it does not train.
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
    choices: Choices | None = None

    def architecture(self) -> Architecture:
        """Blocks, groups and depths; of a checked variant."""
        return Architecture(cast(tuple[str, ...], self.blocks), self.groups, self.depths)

    def full_windows(self) -> list[Window]:
        """The window (t, h, w) of each stage."""
        windows: list[Window] = []
        for window in self.windows:
            spatial = (window, window) if isinstance(window, int) else tuple(window)
            t, h, w = (self.frames, *spatial)[-3:]
            windows.append((t, h, w))
        return windows


# s is the released Something-Something S/16. The release's b and l do not build (392 channels do not divide by 32
# groups): b keeps the published depths and l deepens it, both with widths that divide.
VARIANTS = {
    "tiny": Variant(
        dims=(16, 32, 48, 64),
        depths=(1, 2, 1, 1),
        groups=(4, 8, 8, 16),
        windows=(8, 4, 4, 2),
        frames=4,
        image_size=64,
    ),
    "s": Variant(dims=(72, 144, 288, 576), depths=(3, 4, 9, 3)),
    "b": Variant(dims=(96, 192, 384, 768), depths=(4, 6, 15, 4)),
    "l": Variant(dims=(112, 224, 448, 896), depths=(4, 8, 21, 4)),
}
CLIP_LENGTHS = (8, 16, 32)


def list_models() -> list[str]:
    """Names that ``create_model`` takes: a variant, or a variant with its clip length, as in ``s16``."""
    return [*VARIANTS, *(f"{v}{frames}" for v in VARIANTS if v != "tiny" for frames in CLIP_LENGTHS)]


def model_variant(name: str, **overrides: Any) -> Variant:
    """The checked plain data of a model; arguments and errors as for ``create_model``."""
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
        variant = replace(variant, choices=choices_of(name, variant.choices))
    if problems := find_problems(variant):
        raise UserError(f"model {name!r} cannot be built: " + "; ".join(problems))
    return variant


def create_model(name: str, **overrides: Any) -> PosMLPVideo:
    """Build a model with fresh weights.

    Args:
        name: one of ``list_models()``.
        overrides: fields of ``Variant`` that differ from the named one, as plain data.

    Returns:
        A module from clips ``[B, 3, T, H, W]`` to logits ``[B, num_classes]``; ``features`` gives the stages' maps.

    Raises:
        UserError: a ValueError; the name or an override is unknown, or the combination cannot be built.
    """
    variant = model_variant(name, **overrides)
    keys = ("dims", "num_classes", "drop_path", "dropout")
    same = {key: getattr(variant, key) for key in keys} | {"windows": variant.full_windows()}
    own = variant.architecture()
    if variant.choices:
        return Supernet(variant.choices.around(own), own, **same)
    return PosMLPVideo(**same, **asdict(own))


def choices_of(name: str, plain: Mapping[str, Any]) -> Choices:
    """Choices from plain data.

    Raises:
        UserError: they have another form.
    """
    known = [f.name for f in fields(Choices)]
    if unknown := [key for key in plain if key not in known]:
        raise UserError(f"model {name!r} cannot be built: choices of {unknown} are not known; known: {known}")
    for key, stages in plain.items():
        if not isinstance(stages, list | tuple) or not all(isinstance(values, list | tuple) for values in stages):
            raise UserError(f"model {name!r} cannot be built: choices of {key} {stages!r} must be a list a stage")
    return Choices(**{key: tuple(tuple(values) for values in stages) for key, stages in plain.items()})


def find_problems(variant: Variant) -> list[str]:
    """What makes a variant impossible to build, one sentence each."""
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
    if not problems:
        for i, (dim, groups) in enumerate(zip(variant.dims, variant.groups, strict=True), start=1):
            if dim % groups:
                problems.append(f"stage {i}: {dim} channels do not divide by {groups} groups")
        if variant.dims[0] % 2:
            problems.append(f"stage 1: {variant.dims[0]} channels must be even, as the stem starts with half of them")
        if variant.choices:
            problems += choice_problems(variant, variant.choices)
    return problems


def choice_problems(variant: Variant, choices: Choices) -> list[str]:
    """What makes choices around an otherwise right variant impossible, one sentence each."""
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
    """A hint such as `` (did you mean 's16'?)``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
