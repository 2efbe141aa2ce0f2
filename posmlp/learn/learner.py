"""One training step, one evaluation step, and the state that both need."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posmlp.config import Config
from posmlp.learn.optim import build_optimizer, learning_rate
from posmlp.video.augment import to_input


@dataclass(frozen=True)
class Batch:
    """What one step works on.

    Attributes:
        clips: uint8 ``[B, T, H, W, 3]``, RGB.
        labels: int64 ``[B]``.
        weights: float32 ``[B]``, 1, or 0 where a clip only fills its place (a bad video, or padding of the last batch).
        draws: float32 ``[B, DRAWS]``, the clips' random numbers (``posmlp.video.augment``).
    """

    clips: Tensor
    labels: Tensor
    weights: Tensor
    draws: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, k).to(device, non_blocking=True) for k in self.__dataclass_fields__))


class Learner:
    """A model in training: steps, schedule, weight average.

    Args:
        model: the backbone on its device; wrapped in DDP where there are several workers.
        config: the whole recipe.
        steps_per_epoch: optimizer steps in an epoch.
    """

    def __init__(self, model: nn.Module, config: Config, steps_per_epoch: int):
        self.model = model
        self.raw = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(self.raw, config.optim)
        ema = config.optim.ema
        self.ema = AveragedModel(self.raw, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None

    @property
    def evaluated(self) -> nn.Module:
        """The weights that count: the average if there is one."""
        return self.ema.module if self.ema else self.raw

    def autocast(self) -> AbstractContextManager[Any]:
        bf16 = self.config.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def train_step(self, batch: Batch) -> Tensor:
        """One optimizer step; returns the mean loss of the batch, a scalar on the device."""
        optim = self.config.optim
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step / self.steps_per_epoch, self.config.train.epochs, optim)
        clips = to_input(batch.clips, batch.draws, self.config)
        with self.autocast():
            logits = self.model(clips)
        losses = F.cross_entropy(logits.float(), batch.labels, reduction="none", label_smoothing=optim.label_smoothing)
        loss = (losses * batch.weights).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if optim.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip_grad)
        self.optimizer.step()
        self.step += 1
        if self.ema:
            self.ema.update_parameters(self.raw)
        return loss.detach()

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Tensor:
        """Sums over the batch: float64 ``[4]`` of loss, top-1 hits, top-5 hits, clips."""
        self.evaluated.eval()
        with self.autocast():
            logits = self.evaluated(to_input(batch.clips, None, self.config))
        losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]  # [B, 5]
        rows = torch.stack([losses, ranked[:, 0], ranked.any(1), torch.ones_like(losses)])  # [4, B]
        return (rows.double() * batch.weights).sum(1)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain data."""
        return {
            "model": self.raw.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.raw.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.step = state["step"]
