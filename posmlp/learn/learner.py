"""One training step, one evaluation step, and the state that both need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.learn.average import WeightAverage
from posmlp.learn.optim import build_optimizer, learning_rate
from posmlp.learn.parallel import average, gradients_summed, rank, total_norm, workers
from posmlp.model.supernet import Supernet
from posmlp.video.augment import flip_labels, to_input, to_train_input

EXPLODED = 10  # times the loss of a guess: no training comes back from there
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # as on one device, whatever the number of workers


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

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in order, in parts of ``size`` clips; the last may be smaller."""
        columns = (x.split(size) for x in (self.clips, self.labels, self.weights, self.seeds))
        for part in zip(*columns, strict=True):
            yield Batch(*part)


class ExplodedError(UserError):
    """A step whose loss or gradient is no number, or far beyond that of a guess. The weights are those before it."""


@dataclass(frozen=True)
class Step:
    """What a training step found, the same on all workers.

    Attributes:
        loss: mean over the global batch.
        grad_norm: 2-norm of the gradient, before it is clipped.
    """

    loss: float
    grad_norm: float


class Learner:
    """A model in training: steps, schedule, weight average.

    Args:
        model: the backbone as it trains (``posmlp.learn.parallel.parallelise``), or a plain one.
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
        self.classes = config.model.variant().num_classes
        self.flipped = flip_labels(config.augment.flip_classes, classes, self.classes).to(self.device)
        self.optimizer = build_optimizer(self.raw, config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.precision == "fp16")
        self.ema = WeightAverage(self.raw, config.optim.ema) if config.optim.ema else None

    def averaged(self) -> AbstractContextManager[None]:
        """The model has the weights that count, for a while: the average if there is one."""
        return self.ema.in_place() if self.ema else nullcontext()

    def train_step(self, batch: Batch) -> Step:
        """One optimizer step on this worker's share of a global batch, in parts of ``scaling.device_batch`` clips.

        Dropout and drop path draw from (``train.seed``, step, worker) alone, the architecture of a supernet's step from
        the first two.

        Raises:
            ExplodedError: on all workers, and before the weights change.
        """
        optim = self.config.optim
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step / self.steps_per_epoch, self.config.train, optim)
        torch.manual_seed((self.config.train.seed * 1_000_003 + self.step) * 1_009 + rank())
        if isinstance(self.raw, Supernet):
            self.raw.draw(self.config.train.seed, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss, norm = self.backward(batch)
        step = Step(*average([loss, norm]))
        self.check(step)
        if optim.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), optim.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.ema:
            self.ema.update()
        return step

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss; returns that loss on this worker and the gradients' 2-norm, scalars.

        The mean is over the recipe's global batch, whatever fills this worker's share of it.
        """
        share = self.config.train.global_batch / workers()
        count, loss = len(batch.labels), torch.zeros((), device=self.device)
        size = part_size(count, self.config)
        done = 0
        for part in batch.parts(size):
            done += len(part.labels)
            with gradients_summed(self.model, done == count):
                clips, targets = to_train_input(part, self.config, self.flipped)
                with autocast(self.device, self.config):
                    logits = self.model(clips).float()
                smoothing = self.config.optim.label_smoothing
                losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
                part_loss = (losses * part.weights.to(self.device, non_blocking=True)).sum() / share
                self.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        self.scaler.unscale_(self.optimizer)
        return loss, total_norm(self.model.parameters())

    def check(self, step: Step) -> None:
        """Refuse a step that would spoil the weights; in fp16 a gradient that overflows is only left out."""
        limit = EXPLODED * max(1.0, math.log(self.classes))
        overflow_only = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if step.loss <= limit and (math.isfinite(step.grad_norm) or overflow_only):  # false for NaN
            return
        raise ExplodedError(
            f"step {self.step} exploded: loss {step.loss:.4g} (a guess has {math.log(self.classes):.3g}), "
            f"gradient norm {step.grad_norm:.4g}"
        )

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Logarithms of the class probabilities of a batch's views, float32 ``[videos, views, classes]``.

        The weights are used as they are; see ``averaged``.
        """
        self.raw.eval()
        return score_views(self.raw, batch.clips, self.config)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights that count, by name, on the CPU; empty on workers other than the first, which all must
        call."""
        with self.averaged():
            whole = cast(dict[str, Tensor], get_model_state_dict(self.raw, options=WHOLE))
            return {name: tensor.clone() for name, tensor in whole.items()}

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides ``weights()``, as tensors and plain data. All workers must call; the
        first one's counts."""
        return {
            "model": get_model_state_dict(self.raw, options=WHOLE) if self.ema else None,
            "optimizer": self.optimizer_state(),
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "step": self.step,
        }

    def optimizer_state(self) -> dict[str, Any] | None:
        """None before the first step that counts: PyTorch would make one up, with a step more than was made."""
        if not self.optimizer.state:
            return None
        return cast(dict[str, Any], get_optimizer_state_dict(self.raw, self.optimizer, options=WHOLE))

    def load_state_dict(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from ``weights()`` and ``state_dict()``, of any number of workers.

        What the recipe says of the optimizer holds, also where it was another then; a weight average that is new
        starts from the weights.
        """
        whole = StateDictOptions(full_state_dict=True)
        own = [{k: group[k] for k in ("weight_decay", "betas")} for group in self.optimizer.param_groups]
        set_model_state_dict(self.raw, dict[str, Any](state["model"] or weights), options=whole)
        if self.ema:
            self.ema = WeightAverage(self.raw, self.ema.decay)
            if state["model"]:
                with self.ema.in_place():
                    set_model_state_dict(self.raw, dict[str, Any](weights), options=whole)
                self.ema.updates = state["ema_updates"]
        if state["optimizer"]:
            some = StateDictOptions(full_state_dict=True, strict=False)  # what no step has used has none
            set_optimizer_state_dict(self.raw, self.optimizer, state["optimizer"], options=some)
            for name, parameter in self.raw.named_parameters():
                if name not in state["optimizer"]["state"]:
                    self.optimizer.state.pop(parameter, None)
            for group, values in zip(self.optimizer.param_groups, own, strict=True):
                group.update(values)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


def part_size(count: int, config: Config) -> int:
    """Clips on the device at once, at most ``scaling.device_batch``: as equal parts as whole videos and pairs allow."""
    parts = math.ceil(count / (config.scaling.device_batch or count))
    return math.ceil(count / parts / config.clips_together) * config.clips_together


def autocast(device: torch.device, config: Config) -> AbstractContextManager[Any]:
    """The precision that a recipe trains and scores in, ``train.precision``."""
    dtype = PRECISIONS.get(config.train.precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def score_views(model: nn.Module, clips: Tensor, config: Config) -> Tensor:
    """Logarithms of the class probabilities of videos' views, float32 ``[videos, views, classes]``.

    Args:
        model: in eval mode.
        clips: uint8 ``[videos * views, T, H, W, 3]`` on the model's device, a video's views adjacent.
    """
    with torch.no_grad(), autocast(clips.device, config):
        logits = cast(Tensor, model(to_input(clips, config)))
    return logits.float().log_softmax(1).unflatten(0, (-1, config.eval.clips * config.eval.crops))
