"""A supernet: all architectures of a search space in one model with shared weights.

An architecture chooses block type, group count and depth for each stage. Two architectures share everything that they
have in common. One of depth d uses the first d blocks of a stage. Block types share the units of a kind, so
``parallel`` and both cascades have the same spatial and temporal units. Where only the group counts differ, everything
but the position tables is shared. Each training step draws one architecture uniformly (single path, Guo et al.,
arXiv:1904.00420). All architectures share the stem, which has the only batch norms, so no architecture needs its
statistics recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from posmlp.model.backbone import Block, PosMLPVideo, Stage, Unit, init_linear
from posmlp.model.gates import PositionGate
from posmlp.model.spec import Architecture, Choices, Window, block_units, unit_window


class Supernet(PosMLPVideo):
    """All architectures of some choices. In training mode it runs the one drawn last, in eval mode its own.

    Args:
        choices: candidate values for each of the four stages, none of them empty.
        own: the architecture that runs in eval mode.
        dims, windows, num_classes, drop_path, dropout, stage4_stride: as for ``PosMLPVideo``, the same for all
            architectures.

    Attributes:
        drawn: the architecture of the next training step, see ``draw``.
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
    ):
        deepest = [max(depths) for depths in choices.depths]
        super().__init__(dims, deepest, own.groups, windows, own.blocks, num_classes, drop_path, dropout, stage4_stride)
        self.choices, self.own, self.drawn = choices, own, own
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

    def draw(self, *seed: int) -> None:
        """Draw the architecture of the next training steps; equal seeds draw equal architectures, on every worker."""
        import numpy as np  # the other models do without NumPy

        self.drawn = self.choices.draw(np.random.default_rng(seed))

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
        """Feature maps as of ``PosMLPVideo``: of the drawn architecture in training mode, otherwise of its own."""
        return self.member(self.drawn if self.training else self.own).features(clip)


def as_stage(module: nn.Module) -> Stage:
    """Cast a module list's entry for the type checker."""
    return cast(Stage, module)


def share(unit: Unit, shared: Unit, groups: int) -> None:
    """Let a member's unit use the weights of the supernet's unit."""
    unit.norm, unit.fc1, unit.fc2 = shared.norm, shared.fc1, shared.fc2
    tables = cast(nn.ParameterDict, shared.gate.tables)
    unit.gate.table, unit.gate.bias = tables[str(groups)], shared.gate.bias
