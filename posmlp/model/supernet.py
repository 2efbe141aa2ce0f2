"""A supernet: all architectures of a search space in one model with shared weights.

An architecture chooses block type, group count and depth for each stage. Two architectures share everything that they
have in common. One of depth d uses the first d blocks of a stage. Block types share the units of a kind, so
``parallel`` and both cascades have the same spatial and temporal units. Where only the group counts differ, everything
but the position tables is shared.

A training step runs several architectures, its *paths*, on the same clips, and takes one step of the optimizer on their
mean loss. The paths are the deepest architecture, the shallowest, and random ones; the deepest learns from the labels,
the others from its outputs (the sandwich rule and in-place distillation of slimmable networks, arXiv:1903.05134, and
BigNAS, arXiv:2003.11142; the loss is in ``posmlp.tasks.recognition``). All choices of a stage are drawn equally often
(``draw_paths``). All architectures share the stem, which has the only batch norms, so no architecture needs its
statistics recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from posmlp.model.backbone import Block, PosMLPVideo, Stage, Stem, Unit, init_linear, scale_init
from posmlp.model.gates import PositionGate
from posmlp.model.spec import STAGES, Architecture, Choices, Window, block_units, residual_steps, unit_window

Value = TypeVar("Value")


class Supernet(PosMLPVideo):
    """All architectures of some choices. In training mode it runs the paths drawn last, in eval mode its own.

    Args:
        choices: candidate values for each of the four stages, none of them empty.
        own: the architecture that runs in eval mode.
        dims, windows, num_classes, drop_path, dropout, stage4_stride, init: as for ``PosMLPVideo``, the same for
            all architectures; the scale of ``init`` is that of the longest.

    Attributes:
        paths: the architectures of the next training step, see ``draw``.
    """

    def __init__(
        self,
        choices: Choices,
        own: Architecture,
        dims: Sequence[int],
        windows: Sequence[Window],
        num_classes: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        stage4_stride: int = 32,
        init: str = "published",
    ):
        deepest = [max(depths) for depths in choices.depths]
        super().__init__(dims, deepest, own.groups, windows, own.blocks, num_classes, drop_path, dropout, stage4_stride)
        self.choices, self.own, self.paths = choices, own, [own]
        self.shared_args: dict[str, Any] = {
            "dims": dims,
            "windows": windows,
            "num_classes": num_classes,
            "drop_path": drop_path,
        }
        for i, stage in enumerate(self.stages):
            kinds = dict.fromkeys(u for block in choices.blocks[i] for u in block_units(block))
            for block in cast(Stage, stage).blocks:
                units = {k: Unit(dims[i], 1, unit_window(k, windows[i])).apply(init_linear) for k in kinds}
                for unit in units.values():
                    tables = {str(count): PositionGate(count, unit.gate.window).table for count in choices.groups[i]}
                    del unit.gate.table
                    unit.gate.tables = nn.ParameterDict(tables)
                cast(Block, block).units = nn.ModuleDict(units)
        if init == "scaled":
            longest = [max(blocks, key=lambda block: residual_steps([block], [1])) for blocks in choices.blocks]
            scale_init(self, residual_steps(longest, deepest))

    def draw(self, count: int, seed: int, step: int) -> None:
        """Draw the paths of a training step, as ``draw_paths`` does."""
        self.paths = draw_paths(self.choices, count, seed, step)

    def member(self, architecture: Architecture) -> PosMLPVideo:
        """Build the model of one architecture on the supernet's own weights: training one trains the other.

        Its ``state_dict()`` fits ``create_model`` with the same blocks, groups and depths.
        """
        with torch.device("meta"):  # takes no memory and draws no random numbers
            model = PosMLPVideo(**self.shared_args, **asdict(architecture))
        model.stem, model.norm, model.head, model.dropout = self.stem, self.norm, self.head, self.dropout
        for i, (source, stage) in enumerate(self.stage_pairs(model)):
            stage.downsample, stage.recompute = source.downsample, source.recompute
            for shared, block in zip(source.blocks, stage.blocks, strict=False):  # the first blocks of the stage
                for kind, unit in cast(Block, block).units.items():
                    share(cast(Unit, unit), cast(Unit, cast(Block, shared).units[kind]), architecture.groups[i])
        return model.train(self.training)

    def freeze(self) -> PosMLPVideo:
        """As of ``PosMLPVideo``; returns the model of the supernet's own architecture."""
        return self.member(self.own).freeze()

    def stage_pairs(self, model: PosMLPVideo) -> Iterator[tuple[Stage, Stage]]:
        """Yield each stage of the supernet with the same stage of a member."""
        return zip(map(as_stage, self.stages), map(as_stage, model.stages), strict=True)

    def features(self, clip: Tensor) -> list[Tensor]:
        """Feature maps of its own architecture, as of ``PosMLPVideo``."""
        return self.member(self.own).features(clip)

    def forward(self, clip: Tensor, boxes: Tensor | None = None, box_clip: Tensor | None = None) -> Tensor:
        """Logits as of ``PosMLPVideo``: of its own architecture, or in training mode of all paths.

        All paths in one forward pass: the stem runs once, its batch norms count the clips once, and DDP sees all used
        parameters at once.

        Returns:
            ``[B, num_classes]``, or in training mode ``[paths, B, num_classes]``. With boxes, N in place of B.
        """
        if not self.training:
            return super().forward(clip, boxes, box_clip)
        x, logits = self.stem(clip), []
        for path in self.paths:
            member = self.member(path)
            member.stem = cast(Stem, nn.Identity())
            logits.append(member(x, boxes, box_clip))
        return torch.stack(logits)


def draw_paths(choices: Choices, count: int, seed: int, step: int) -> list[Architecture]:
    """Draw the paths of a training step. Of two or more, the first is the deepest and the second the shallowest.

    Everything else is drawn for each stage by itself, by ``fair_draw``. A set of units, such as spatial and temporal,
    is drawn first. A block type with these units and a group count follow. So each set of units is trained equally
    often, whether one block type has it or three, and so are the tables of a unit. Where block types share some of
    their units only, as ``parallel`` and ``spatial`` do, the shared unit is trained more often.

    A stage's last block is on fewer paths than its first. The deepest path trains it in every step.

    The result depends on the arguments alone, so all workers, and a resumed run, draw the same.

    Args:
        count: number of paths.
        seed: seed of the run, at least 0.
        step: number of the step.
    """
    paths = []
    for path in range(count):
        stages = [draw_stage(choices, stage, path, seed, step) for stage in range(STAGES)]
        blocks, groups, depths = zip(*stages, strict=True)
        if count > 1 and path < 2:
            depths = tuple(map((max, min)[path], choices.depths))
        paths.append(Architecture(blocks, groups, depths))
    return paths


def draw_stage(choices: Choices, stage: int, path: int, seed: int, step: int) -> tuple[str, int, int]:
    """Draw block type, group count and depth of one stage of a path; arguments as of ``draw_paths``."""
    by_units: dict[frozenset[str], list[str]] = {}
    for block in choices.blocks[stage]:
        by_units.setdefault(frozenset(block_units(block)), []).append(block)
    kind = fair_draw(range(len(by_units)), step, path, seed, stage, 0, 0)
    drawn = step // len(by_units)  # how often this path had these units before: once in each cycle
    block = fair_draw(list(by_units.values())[kind], drawn, path, seed, stage, 1, kind)
    groups = fair_draw(choices.groups[stage], drawn, path, seed, stage, 2, kind)
    depth = fair_draw(choices.depths[stage], step, path, seed, stage, 3, 0)
    return block, groups, depth


def fair_draw(values: Sequence[Value], number: int, path: int, *seed: int) -> Value:
    """Draw one of some values, so that each comes equally often (after FairNAS, arXiv:1907.01845).

    A cycle has a draw for each value. In a cycle, each path gets each value once, in random order. At the same draw,
    the paths get different values as far as there are enough.

    Args:
        number: of the draw, from 0.
        path: number of the path.
        seed: seed of the random orders.
    """
    import numpy as np  # the other models do without NumPy

    cycle, place = divmod(number, len(values))
    order = np.random.default_rng((*seed, cycle)).permutation(len(values))
    return values[order[(place + path) % len(values)]]


def as_stage(module: nn.Module) -> Stage:
    """Cast a module list's entry for the type checker."""
    return cast(Stage, module)


def share(unit: Unit, shared: Unit, groups: int) -> None:
    """Let a member's unit use the weights of the supernet's unit."""
    unit.norm, unit.fc1, unit.fc2 = shared.norm, shared.fc1, shared.fc2
    tables = cast(nn.ParameterDict, shared.gate.tables)
    unit.gate.table, unit.gate.bias = tables[str(groups)], shared.gate.bias
