"""One model that holds many: every architecture of a set, with shared weights, trained a random one a step.

An architecture chooses block type, group count and depth for each stage. Two of them share all that they have in
common: one of depth d has the first d blocks of a stage; block types share the units of a kind, so ``parallel`` and
both cascades have the same spatial and temporal units; and where only the group counts differ, all but the position
tables is shared. Training draws architectures uniformly, one path a step (Guo et al., arXiv:1904.00420). The stem,
which has the only batch norms, is the same for all, so that no statistics need to be taken anew for one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from posmlp.model.backbone import Block, PosMLPVideo, Stage, Unit, init_linear
from posmlp.model.gates import PositionGate
from posmlp.model.spec import Architecture, Choices, Window, block_units, unit_window


class Supernet(PosMLPVideo):
    """All architectures of some choices. In training it runs the one drawn last, else its own.

    Args:
        choices: an entry for each of the four stages, none of them empty.
        own: the architecture that it runs as when it does not train.
        dims, windows, num_classes, drop_path, dropout: of all; as for ``PosMLPVideo``.

    Attributes:
        drawn: what the next training step runs; see ``draw``.
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
    ):
        deepest = [max(depths) for depths in choices.depths]
        super().__init__(dims, deepest, own.groups, windows, own.blocks, num_classes, drop_path, dropout)
        self.choices, self.own, self.drawn = choices, own, own
        self.plan: dict[str, Any] = {
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
        """Draw the architecture of the next training steps; the same seed draws the same, on every worker."""
        self.drawn = self.choices.draw(np.random.default_rng(seed))

    def member(self, architecture: Architecture) -> PosMLPVideo:
        """The model of one architecture, on the supernet's own weights: who trains the one trains the other.

        Its ``state_dict()`` fits ``create_model`` with the same blocks, groups and depths.
        """
        with torch.device("meta"):  # no memory, no random numbers
            model = PosMLPVideo(**self.plan, **asdict(architecture))
        model.stem, model.norm, model.head, model.dropout = self.stem, self.norm, self.head, self.dropout
        for i, (source, stage) in enumerate(self.pairs(model)):
            stage.downsample, stage.recompute = source.downsample, source.recompute
            for shared, block in zip(source.blocks, stage.blocks, strict=False):  # a stage has its first blocks
                for kind, unit in cast(Block, block).units.items():
                    take(cast(Unit, unit), cast(Unit, cast(Block, shared).units[kind]), architecture.groups[i])
        return model.train(self.training)

    def pairs(self, model: PosMLPVideo) -> Iterator[tuple[Stage, Stage]]:
        """Each stage of the supernet beside that of a member."""
        return zip(map(as_stage, self.stages), map(as_stage, model.stages), strict=True)

    def features(self, clip: Tensor) -> list[Tensor]:
        """As of a ``PosMLPVideo``, of the architecture that was drawn last in training, else of its own."""
        return self.member(self.drawn if self.training else self.own).features(clip)


def as_stage(module: nn.Module) -> Stage:
    """A module list's entry, for the type checker."""
    return cast(Stage, module)


def take(unit: Unit, shared: Unit, groups: int) -> None:
    """Give a member's unit the weights of the supernet's."""
    unit.norm, unit.fc1, unit.fc2 = shared.norm, shared.fc1, shared.fc2
    tables = cast(nn.ParameterDict, shared.gate.tables)
    unit.gate.table, unit.gate.bias = tables[str(groups)], shared.gate.bias
