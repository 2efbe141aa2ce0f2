"""The training step, the evaluation step, and the state from which training resumes.

``Learner.start_step`` sets the learning rate (``posmlp.learn.optim``), accumulates the gradients of all micro-batches
(``Learner.backward``), clips the gradient, steps the optimizer and updates the EMA (``posmlp.learn.ema``), in this
order. It only queues this work on the device, and waits for none of it. The device itself decides whether the step has
exploded, and then leaves all state as it was. ``StartedStep.result`` waits and tells.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.modules.batchnorm import _BatchNorm

from posmlp.errors import UserError
from posmlp.learn.ema import WeightEMA
from posmlp.learn.finetune import freeze_parts
from posmlp.learn.optim import RATE_SCALE, build_optimizer, learning_rate
from posmlp.learn.parallel import average_over_workers, gradient_sync, rank, total_norm
from posmlp.model.backbone import PosMLPVideo
from posmlp.model.supernet import Supernet
from posmlp.tasks import task_of
from posmlp.video.batch import Batch

if TYPE_CHECKING:  # it needs pydantic
    from posmlp.config import Config

MAX_LOSS_RATIO = 10  # training does not recover from a loss above this multiple of a random guess's loss
# Checkpoints hold full tensors on the CPU, so that any number of workers can load them.
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ExplodedError(UserError):
    """Training diverged: a step's loss is not finite or far above a random guess's, or its gradient is not finite.

    The learner is as before the step.
    """


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of a training step, the same on all workers.

    Attributes:
        loss: mean over the global batch.
        grad_norm: 2-norm of the gradient, before it is clipped.
    """

    loss: float
    grad_norm: float


class HostCopy:
    """A tensor's copy to the CPU, queued on its device now. A later read waits for no work that is queued after it."""

    def __init__(self, values: Tensor):
        on_gpu = values.device.type == "cuda"
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
        self.values = copy.copy_(values, non_blocking=True)
        self.copied = torch.cuda.current_stream(values.device).record_event() if on_gpu else None

    def read(self) -> Tensor:
        """Wait for the copy, and return it."""
        if self.copied:
            self.copied.synchronize()
        return self.values


class StartedStep:
    """A training step whose work is queued on the device.

    Attributes:
        step: number of optimizer steps before it.
        ended: when it was known to have ended, in seconds of ``time.perf_counter``. On a GPU ``result`` sets it.
    """

    def __init__(self, learner: Learner, numbers: Tensor):
        """Queue the copy of the step's numbers to the CPU: loss, gradient norm, 1 if the step was refused."""
        self.learner, self.step, self.ema_updates = learner, learner.step, learner.ema_updates
        self.numbers = HostCopy(numbers)
        self.ended = time.perf_counter()

    def result(self) -> StepResult:
        """Wait for the step, and return its loss and gradient norm. Call it once, and for all steps in their order.

        Raises:
            ExplodedError: on all workers. The learner is as before the step. Steps that were started later have changed
                nothing and have no result.
        """
        if self.learner.unread[:1] != [self]:
            raise RuntimeError(f"step {self.step} has no result now: read each once, in order, up to one that exploded")
        loss, norm, refused = self.numbers.read().tolist()
        if self.numbers.copied:
            self.ended = time.perf_counter()
        if refused:
            self.learner.return_to(self)
            guess = self.learner.objective.guess
            raise ExplodedError(
                f"step {self.step} exploded: loss {loss:.4g} (a random guess has {guess:.3g}), gradient norm {norm:.4g}"
            )
        self.learner.unread.pop(0)
        return StepResult(loss, norm)


class Learner:
    """A model in training, with its optimizer, gradient scaler and EMA.

    Args:
        model: the backbone, plain or wrapped for distributed training (``posmlp.learn.parallel.parallelise``).
        config: the whole recipe.
        steps_per_epoch: optimizer steps in an epoch.
        class_names, class_weights: as for ``Task.objective``.

    Attributes:
        model: what computes the training step: the backbone, plain or wrapped.
        module: the backbone without ``DistributedDataParallel``; with FSDP its parameters are sharded.
        step: number of started optimizer steps.
        unread: the started steps whose results were not read yet.
        num_classes: length of the logits.
        objective: the loss of the recipe's task.
        frozen: the parts that do not learn (``optim.freeze``). They stay in eval mode: no drop path, no dropout, and
            batch norms use their stored statistics and leave them unchanged.
        ema: the moving average of the weights; None without ``optim.ema``. The model itself holds the live weights.

    Raises:
        UserError: the recipe does not fit the classes.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        steps_per_epoch: int,
        class_names: Sequence[str] = (),
        class_weights: NDArray[np.float64] | None = None,
    ):
        self.model = model
        self.module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.device = next(model.parameters()).device
        self.num_classes = config.model.variant().num_classes
        self.task = task_of(config)
        self.objective = self.task.objective(config, class_names, class_weights, self.device)
        self.frozen = freeze_parts(cast(PosMLPVideo, self.module), config.optim.freeze)
        self.optimizer = build_optimizer(self.module, config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.precision == "fp16")
        self.ema = WeightEMA(self.module, config.optim.ema) if config.optim.ema else None
        self.max_loss = MAX_LOSS_RATIO * max(1.0, self.objective.guess) * self.objective.heaviest
        self.unread: list[StartedStep] = []
        self.refused = torch.zeros((), device=self.device)  # 1 from a step that exploded on, until its result is read
        norms = [module for module in self.module.modules() if isinstance(module, _BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]

    @property
    def ema_updates(self) -> int:
        """Number of updates of the EMA."""
        return self.ema.updates if self.ema else 0

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Context in which the model holds its evaluation weights (EMA if enabled)."""
        return self.ema.applied() if self.ema else nullcontext()

    def train_step(self, batch: Batch) -> StepResult:
        """Start a step and wait for its result.

        Raises:
            ExplodedError: on all workers. The learner is as before the step.
        """
        return self.start_step(batch).result()

    def start_step(self, batch: Batch) -> StartedStep:
        """Queue one optimizer step on this worker's share of a global batch.

        Gradients are accumulated over micro-batches of at most ``scaling.micro_batch`` clips. Dropout and drop path
        depend only on (``train.seed``, step, rank). The ``train.paths`` architectures that a supernet draws depend only
        on (``train.seed``, step).

        A step that explodes leaves weights, optimizer, loss scale, batch norms' statistics and EMA as they were, and so
        do all that are started before its result is read.
        """
        optim = self.config.optim
        self.model.train()
        for part in self.frozen:
            part.eval()
        rate = learning_rate(self.step / self.steps_per_epoch, self.config.train, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get(RATE_SCALE, 1.0)
        torch.manual_seed((self.config.train.seed * 1_000_003 + self.step) * 1_009 + rank())
        if isinstance(self.module, Supernet):
            self.module.draw(self.config.train.paths, self.config.train.seed, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        scale = self.scaler.scale(torch.ones((), device=self.device))  # the loss scale; 1 without fp16
        scaling: list[Any] = [self.scaler._scale, self.scaler._growth_tracker] if self.scaler.is_enabled() else []
        guarded = [(x, x.clone()) for x in (*self.statistics, *scaling)]
        loss, norm = self.backward(batch)
        numbers = average_over_workers(torch.stack([loss, norm]).double())
        exploded, finite = self.exploded(numbers, scale), numbers[1].isfinite()
        self.refused = torch.maximum(self.refused, exploded.float())
        if optim.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), optim.clip_grad, norm)
        # What GradScaler gives a fused optimizer: where it is 1, the optimizer's kernels change nothing.
        self.optimizer.found_inf = torch.where(finite, self.refused, 1.0)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        for now, before in guarded:
            now.copy_(torch.where(self.refused > 0, before, now))
        started = StartedStep(self, torch.cat([numbers, self.refused.double().view(1)]))
        self.unread.append(started)
        self.step += 1
        if self.ema:
            self.ema.update(self.refused)
        return started

    def exploded(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """Whether a step would spoil the weights: bool scalar, on the device.

        In fp16, an infinite gradient may only mean that the loss scale is too high: the optimizer then skips the step.

        Args:
            numbers: loss and gradient norm.
            scale: the loss scale.
        """
        loss, norm = numbers.unbind()
        return ~((loss <= self.max_loss) & (norm.isfinite() | (scale > 1)))  # no comparison with NaN is true

    def return_to(self, step: StartedStep) -> None:
        """Forget a step that was refused and all steps after it. The device has not taken them."""
        self.step, self.unread = step.step, []
        self.refused = torch.zeros_like(self.refused)
        if self.ema:
            self.ema.updates = step.ema_updates

    def check_all_read(self) -> None:
        """Raise ``RuntimeError`` if a step whose result was not read may have been refused."""
        if self.unread:
            raise RuntimeError(f"read the result of step {self.unread[0].step} before you save the learner's state")

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Accumulate the gradients of the mean loss over micro-batches.

        A worker's loss is scaled so that the mean over all workers is the mean over the recipe's global batch
        (``Objective.share``).

        Returns:
            This worker's scaled loss, and the 2-norm of the gradient over all workers; scalars.
        """
        share = self.objective.share(batch)
        count, loss = len(batch.clips), torch.zeros((), device=self.device)
        done = 0
        for micro_batch in batch.micro_batches(micro_batch_size(count, self.config)):
            done += len(micro_batch.clips)
            with gradient_sync(self.model, enabled=done == count):
                partial = self.objective(self.model, micro_batch) / share
                self.scaler.scale(partial).backward()
            loss += partial.detach()
        self.scaler.unscale_(self.optimizer)
        return loss, total_norm(self.model.parameters())

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """The scores of a batch (``Task.score``), float32 ``[..., classes]``.

        Uses the weights that the model holds; call it inside ``evaluation_weights()`` to score with the EMA.
        """
        self.module.eval()
        return self.task.score(self.module, batch, self.config)

    def weights(self) -> dict[str, Tensor]:
        """Copy the evaluation weights (EMA if enabled) to the CPU, by parameter name.

        Collective: call it on every rank. The result is empty on all ranks but 0.
        """
        self.check_all_read()
        with self.evaluation_weights():
            full = cast(dict[str, Tensor], get_model_state_dict(self.module, options=FULL_STATE))
            return {name: tensor.clone() for name, tensor in full.items()}

    def state_dict(self) -> dict[str, Any]:
        """The training state to resume from, in addition to ``weights()``, as tensors and plain data.

        Collective: call it on every rank, and use the result of rank 0. With EMA, ``model`` has the live weights.
        """
        self.check_all_read()
        return {
            "model": get_model_state_dict(self.module, options=FULL_STATE) if self.ema else None,
            "optimizer": self.optimizer_state(),
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema_updates,
            "step": self.step,
        }

    def optimizer_state(self) -> dict[str, Any] | None:
        """The optimizer's state; None before the first step.

        PyTorch would otherwise initialise a state that is one step ahead.
        """
        if not self.optimizer.state:
            return None
        return cast(dict[str, Any], get_optimizer_state_dict(self.module, self.optimizer, options=FULL_STATE))

    def load_state_dict(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Resume from ``weights()`` and ``state_dict()``, saved by any number of workers.

        The optimizer's hyperparameters are this recipe's, even where the saved state has others. Where EMA is enabled
        but the saved run had none, the average starts from the weights.
        """
        full = StateDictOptions(full_state_dict=True)
        hyperparameters = [
            {k: group[k] for k in ("weight_decay", "betas", RATE_SCALE) if k in group}
            for group in self.optimizer.param_groups
        ]
        set_model_state_dict(self.module, dict[str, Any](state["model"] or weights), options=full)
        if self.ema:
            self.ema = WeightEMA(self.module, self.ema.decay)
            if state["model"]:
                with self.ema.applied():
                    set_model_state_dict(self.module, dict[str, Any](weights), options=full)
                self.ema.updates = state["ema_updates"]
        if state["optimizer"]:
            # Not strict: a parameter that no step has used, as in a supernet, has no state.
            partial = StateDictOptions(full_state_dict=True, strict=False)
            groups = [group | {"fused": True} for group in state["optimizer"]["param_groups"]]  # older runs had not
            saved = state["optimizer"] | {"param_groups": groups}
            set_optimizer_state_dict(self.module, self.optimizer, saved, options=partial)
            for name, parameter in self.module.named_parameters():
                if name not in state["optimizer"]["state"]:
                    self.optimizer.state.pop(parameter, None)
            for group, values in zip(self.optimizer.param_groups, hyperparameters, strict=True):
                group.update(values)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.unread, self.refused = state["step"], [], torch.zeros_like(self.refused)


def micro_batch_size(count: int, config: Config) -> int:
    """Clips in a micro-batch when ``count`` clips are split into equal ones of at most ``scaling.micro_batch``.

    The size is rounded up to a multiple of ``config.clips_together``: the clips of a video, and with mixup or cutmix
    the videos of a pair, stay in one micro-batch.
    """
    micro_batches = math.ceil(count / (config.scaling.micro_batch or count))
    return math.ceil(count / micro_batches / config.clips_together) * config.clips_together
