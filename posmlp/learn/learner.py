"""One training step, one evaluation step, and the state that both need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posmlp.config import Config
from posmlp.learn.optim import build_optimizer, learning_rate
from posmlp.video.augment import flip_labels, to_input, to_train_input


@dataclass(frozen=True)
class Batch:
    """What one step works on.

    The clips of one video are adjacent: in training its ``data.repeats`` clips, in validation its ``eval.clips`` x
    ``eval.crops`` views.

    Attributes:
        clips: uint8 ``[B, T, H, W, 3]``, RGB.
        labels: int64 ``[B]``.
        weights: float32 ``[B]``, 1, or 0 where a clip only fills its place (a bad video, or padding of the last batch).
        seeds: int64 ``[B]``, not negative; a clip's random numbers come from its seed (``posmlp.video.augment``).
    """

    clips: Tensor
    labels: Tensor
    weights: Tensor
    seeds: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch with clips and labels on the device; weights and seeds are read on the CPU and stay there."""
        clips, labels = (x.to(device, non_blocking=True) for x in (self.clips, self.labels))
        return replace(self, clips=clips, labels=labels)


class Learner:
    """A model in training: steps, schedule, weight average.

    Args:
        model: the backbone on its device; wrapped in DDP where there are several workers.
        config: the whole recipe.
        steps_per_epoch: optimizer steps in an epoch.
        classes: the class names, for ``augment.flip_classes``; none: classes are called by their labels.

    Raises:
        UserError: ``augment.flip_classes`` does not fit the classes.
    """

    def __init__(self, model: nn.Module, config: Config, steps_per_epoch: int, classes: Sequence[str] = ()):
        self.model = model
        self.raw = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.device = next(model.parameters()).device
        num_classes = config.model.variant().num_classes
        self.flipped = flip_labels(config.augment.flip_classes, classes, num_classes).to(self.device)
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
        clips, targets = to_train_input(batch, self.config, self.flipped)
        with self.autocast():
            logits = self.model(clips)
        losses = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=optim.label_smoothing)
        loss = (losses * batch.weights.to(self.device, non_blocking=True)).mean()
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
        """Sums over the batch's videos: float64 ``[4]`` of loss, top-1 hits, top-5 hits, videos.

        A video's prediction is the mean of its views' probabilities, and its loss the negative logarithm of the mean
        probability of its class.
        """
        self.evaluated.eval()
        with self.autocast():
            logits = self.evaluated(to_input(batch.clips, self.config))
        views = self.config.eval.clips * self.config.eval.crops
        labels, weights = batch.labels[::views], batch.weights[::views].to(self.device)
        # As logarithms, small probabilities keep their order: [B, C] -> [videos, views, C] -> [videos, C]
        scores = logits.float().log_softmax(1).unflatten(0, (-1, views)).logsumexp(1) - math.log(views)
        losses = F.nll_loss(scores, labels, reduction="none")
        ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]  # [videos, 5]
        rows = torch.stack([losses, ranked[:, 0], ranked.any(1), torch.ones_like(losses)])  # [4, videos]
        return (rows.double() * weights).sum(1)

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
