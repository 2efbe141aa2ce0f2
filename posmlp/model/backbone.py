"""PosMLP-Video: stem, four stages of gating blocks, head (arXiv:2407.02934, section 3).

Read from top to bottom: ``Unit`` (norm, fc1, gate, fc2), ``Block`` (combines units), ``Stage`` (window order, blocks),
``PosMLPVideo``. Block types, unit kinds and variants are plain data in ``spec.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posmlp.detection.roi_align import roi_align
from posmlp.model import cpu
from posmlp.model.gates import INIT_STD, PositionGate
from posmlp.model.spec import BLOCKS, Window, block_units, residual_steps, unit_window

TABLE_GAIN = 2.0  # of the signal that a gate takes from its window, in fresh `scaled` weights


def channel_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm without its affine over the first axis of ``[C, ...]``, computed in fp32 or better."""
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    x = x - x.mean(0)
    return (x * torch.rsqrt(x.square().mean(0) + eps)).to(dtype)


class Unit(nn.Module):
    """One gating unit: ``fc2(gate(u, v))`` with ``u, v = split(gelu(fc1(norm(x))))``; u and v have the width of x.

    It only holds the parameters. ``Block`` runs the units of a step together.
    """

    def __init__(self, dim: int, groups: int, window: Window):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.gate = PositionGate(groups, window)
        self.fc2 = nn.Linear(dim, dim)


class Block(nn.Module):
    """A block of one of the types in ``BLOCKS``, on tokens ``[C, B, W, T, N]``."""

    def __init__(self, kind: str, dim: int, groups: int, window: Window, drop_path: float):
        super().__init__()
        self.steps = BLOCKS[kind]
        self.units = nn.ModuleDict({unit: Unit(dim, groups, unit_window(unit, window)) for unit in block_units(kind)})
        self.drop_path = drop_path
        self.frozen: dict[tuple[Any, ...], cpu.Operands] | None = None  # not None: ``PosMLPVideo.freeze`` was called

    def train(self, mode: bool = True) -> Self:
        """As in PyTorch; training ends what ``PosMLPVideo.freeze`` began."""
        if mode:
            self.frozen = None
        return super().train(mode)

    def forward(self, x: Tensor, extent: Window, mask: Tensor | None) -> Tensor:
        """Run all steps; x and the result are ``[C, B, W, T, N]``.

        Args:
            extent: tokens (t, h, w) that a window of the input has.
            mask: ``[W, T, N]``, 0 at padded tokens and 1 at the others; None if nothing is padded.
        """
        for step in self.steps:
            keep_scale = None
            if self.training and self.drop_path > 0:
                kept = torch.rand(x.shape[1], device=x.device) >= self.drop_path  # one draw per clip
                keep_scale = kept / (1 - self.drop_path)
            x = self.run_step(step, x, extent, mask, keep_scale)
        return x

    def run_step(
        self, step: Sequence[str], x: Tensor, extent: Window, mask: Tensor | None, keep_scale: Tensor | None
    ) -> Tensor:
        """Add the outputs of a step's units to x.

        Args:
            step: unit kinds, an entry of ``self.steps``.
            x, extent, mask: as in ``forward``.
            keep_scale: ``[B]``, factor of the units' outputs for each clip (drop path); None: 1.
        """
        units = [cast(Unit, self.units[unit]) for unit in step]
        if cpu.supports(x):
            dtype = cpu.compute_dtype(x)
            if self.frozen is None or (torch.is_grad_enabled() and x.requires_grad):
                return cpu.run_step(x, mask, keep_scale, *self.cpu_parameters(step, extent, dtype))
            key = tuple(step), extent, dtype
            if key not in self.frozen:
                with torch.no_grad():
                    parameters = (each.clone() for each in self.cpu_parameters(step, extent, dtype))
                    self.frozen[key] = cpu.make_operands(dtype, *parameters)
            return cpu.run_operands(x, mask, keep_scale, self.frozen[key])
        weight1, bias1, weight2, bias2 = self.linears(step)
        hidden = weight1 @ channel_norm(x).flatten(1)  # [2C * units, tokens]
        hidden = F.gelu(hidden.add_(bias1[:, None].to(hidden.dtype)))  # adding another dtype would copy
        halves = hidden.view(2 * len(units), *x.shape)
        gated = []
        for unit, u, v in zip(units, halves[::2], halves[1::2], strict=True):
            gated.append(unit.gate(u if mask is None else u * mask.to(u.dtype), v, extent))
        out = weight2 @ torch.cat(gated).flatten(1)
        residual = (out + bias2[:, None].to(out.dtype)).view(x.shape)
        if keep_scale is not None:
            residual = residual * keep_scale.to(residual.dtype).view(-1, 1, 1, 1)
        return x + residual if x.requires_grad or residual.requires_grad else x.add_(residual)

    def cpu_parameters(self, step: Sequence[str], extent: Window, dtype: torch.dtype) -> list[Tensor]:
        """What ``cpu.run_step`` needs of the units of a step."""
        gates = [cast(Unit, self.units[unit]).gate for unit in step]
        with torch.autocast("cpu", enabled=False):
            of_gates = [(gate.mixing_weights(extent, dtype), gate.token_bias(extent)) for gate in gates]
            return [*self.linears(step), *itertools.chain.from_iterable(of_gates)]

    def linears(self, step: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Merge the linear layers of a step's units: all fc1 with the norms' affines folded in, and all fc2.

        Returns:
            Weight and bias of fc1, ``[2C * units, C]`` and ``[2C * units]``, then of fc2, ``[C, C * units]`` and
            ``[C]``.
        """
        units = [cast(Unit, self.units[unit]) for unit in step]
        weight1 = torch.cat([u.fc1.weight * u.norm.weight for u in units])
        bias1 = torch.cat([u.fc1.bias + u.fc1.weight @ u.norm.bias for u in units])
        weight2 = torch.cat([u.fc2.weight for u in units], 1)
        # Not the sum of a stack: gradients of the biases would share memory.
        bias2 = sum((u.fc2.bias for u in units[1:]), units[0].fc2.bias)
        return weight1, bias1, weight2, bias2


class Downsample(nn.Module):
    """Conv(1,3,3) with a stride in space, then LayerNorm."""

    def __init__(self, dim_in: int, dim: int, stride: int = 2):
        super().__init__()
        self.proj = nn.Conv3d(dim_in, dim, (1, 3, 3), (1, stride, stride), (0, 1, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, T, H, W]`` -> ``[B, C, T, H/stride, W/stride]``."""
        x = frame_conv(self.proj, x).permute(0, 2, 3, 4, 1)  # the memory order, so this is a view
        normed = F.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
        return normed.to(x.dtype).permute(0, 4, 1, 2, 3)


class Stem(nn.Module):
    """Two Conv(1,3,3) with stride (1,2,2), each followed by BatchNorm, with a GELU in between."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj1 = nn.Conv3d(3, dim // 2, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.norm1 = nn.BatchNorm3d(dim // 2)
        self.proj2 = nn.Conv3d(dim // 2, dim, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.norm2 = nn.BatchNorm3d(dim)

    def forward(self, clip: Tensor) -> Tensor:
        """``[B, 3, T, H, W]`` -> ``[B, C, T, H/4, W/4]``."""
        x = conv_norm(self.proj1, self.norm1, clip)
        x = torch.ops.aten.gelu_(x) if cpu.supports(x) and not x.requires_grad else F.gelu(x)
        return conv_norm(self.proj2, self.norm2, x)


class Stage(nn.Module):
    """Blocks at one resolution. Tokens are put into window order once, on entry.

    Args:
        dim_in: channels of the previous stage; None for the first stage, which follows the stem without downsampling.
        dim, kind, depth, groups, window: channels, block type, number of blocks, channel groups and window (t, h, w).
        drop_path: stochastic-depth rate of each block.
        stride: of the downsampling, in space.

    Attributes:
        recompute: activation checkpointing; blocks compute their activations again in the backward pass, which takes
            less memory and more time.
    """

    recompute = False

    def __init__(
        self,
        dim_in: int | None,
        dim: int,
        kind: str,
        depth: int,
        groups: int,
        window: Window,
        drop_path: list[float],
        stride: int = 2,
    ):
        super().__init__()
        self.window = window
        self.downsample = Downsample(dim_in, dim, stride) if dim_in else None
        self.blocks = nn.ModuleList(Block(kind, dim, groups, window, drop_path[i]) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, T, H_in, W_in]`` -> ``[B, C, T, H, W]``."""
        if self.downsample:
            x = self.downsample(x)
        size = x.shape[2:]
        # An input smaller than the window uses the window's first tokens.
        extent = cast(Window, tuple(min(n, w) for n, w in zip(size, self.window, strict=True)))
        mask = padding_mask(size, extent, x.device)
        x = to_windows(x, extent)
        for block in self.blocks:
            if self.recompute and x.requires_grad:
                x = cast(Tensor, checkpoint(block, x, extent, mask, use_reentrant=False))
            else:
                x = block(x, extent, mask)
        return from_windows(x, extent, size)


def conv_norm(conv: nn.Conv3d, norm: nn.BatchNorm3d, x: Tensor) -> Tensor:
    """``norm(frame_conv(conv, x))``; in eval mode, where the norm is a scale and a shift, as one convolution."""
    if norm.training:
        return norm(frame_conv(conv, x))
    mean, var, bias = (cast(Tensor, each) for each in (norm.running_mean, norm.running_var, conv.bias))
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return frame_conv(conv, x, (conv.weight * scale.view(-1, 1, 1, 1, 1), (bias - mean) * scale + norm.bias))


def frame_conv(conv: nn.Conv3d, x: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Convolve each frame, ``[B, C_in, T, H_in, W_in]`` -> ``[B, C, T, H, W]``, channels last in memory.

    It runs as a 2D convolution on channels-last frames, the form with the fastest kernels, on CPUs by far. ``weights``
    are the weight and bias to use in place of the convolution's own.
    """
    weight, bias = (conv.weight, conv.bias) if weights is None else weights
    frames = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    (_, *stride), (_, *padding) = conv.stride, cast(tuple[int, ...], conv.padding)
    frames = F.conv2d(frames, weight[:, :, 0], bias, stride, padding)
    # Not len(x), which is a plain number: an exported model would then accept this batch size only.
    return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def grid(size: Sequence[int], extent: Window) -> Window:
    """Number of windows along time, height and width that cover ``size``."""
    t, h, w = (math.ceil(n / e) for n, e in zip(size, extent, strict=True))
    return t, h, w


def to_windows(x: Tensor, extent: Window) -> Tensor:
    """Put tokens into window order: ``[B, C, T, H, W]`` -> ``[C, B, windows, t, h*w]``.

    The far ends are zero-padded to whole windows.
    """
    (t, h, w), (gt, gh, gw) = extent, grid(x.shape[2:], extent)
    pad = [g * e - n for g, e, n in zip((gw, gh, gt), (w, h, t), reversed(x.shape[2:]), strict=True)]
    x = x.permute(0, 2, 3, 4, 1)  # [B, T, H, W, C], the memory order
    if any(pad):
        x = F.pad(x, [0, 0, 0, pad[0], 0, pad[1], 0, pad[2]])
    x = x.unflatten(3, (gw, w)).unflatten(2, (gh, h)).unflatten(1, (gt, t)).permute(0, 1, 3, 5, 2, 4, 6, 7)
    # Two steps, a copy of whole tokens and matrix transposes, are faster than a single permuting copy.
    tokens = x.reshape(-1, x.shape[-1])
    if cpu.supports(x):  # the CPU path wants one window after another in memory
        windows = tokens.unflatten(0, (-1, t * h * w)).mT.contiguous()
        return windows.view(x.shape[0], -1, x.shape[-1], t, h * w).permute(2, 0, 1, 3, 4)
    return tokens.mT.contiguous().view(x.shape[-1], x.shape[0], gt * gh * gw, t, h * w)


def from_windows(x: Tensor, extent: Window, size: Sequence[int]) -> Tensor:
    """Undo ``to_windows``: ``[C, B, windows, t, h*w]`` -> ``[B, C, T, H, W]``, channels last in memory.

    Padding is cut off; ``size`` is (T, H, W).
    """
    (t, h, w), (gt, gh, gw) = extent, grid(size, extent)
    tokens = cpu.by_window(x).flatten(2).mT if cpu.supports(x) else x.flatten(1).mT
    tokens = tokens.contiguous().view(x.shape[1], gt, gh, gw, t, h, w, len(x))
    x = tokens.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[1], gt * t, gh * h, gw * w, len(x))
    return x[:, : size[0], : size[1], : size[2]].permute(0, 4, 1, 2, 3)


def padding_mask(size: Sequence[int], extent: Window, device: torch.device) -> Tensor | None:
    """Mask of the tokens, ``[windows, t, h*w]``: 1 at real tokens, 0 at padded ones. None if nothing is padded."""
    if all(n % e == 0 for n, e in zip(size, extent, strict=True)):
        return None
    return to_windows(torch.ones(1, 1, *size, device=device), extent)[0, 0]


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as the published code does; leave other modules unchanged."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)


def scale_init(model: nn.Module, steps: int) -> None:
    """Scale the fresh weights of a model's units so that signals keep their size: the ``init`` ``scaled``.

    - fc1 and fc2 get the deviation ``1 / sqrt(C)`` of C inputs. With 0.02, outputs of narrow units
      vanish.
    - fc2 is also divided by the square root of the number of residual steps, as in GPT-2. The sum of all steps then has
      the size of one.
    - A position table gets the deviation ``TABLE_GAIN / sqrt(tokens)`` of a window's tokens, so that a gate sees its
      window from the start. Models with 0.5 or 5 in place of 2 leave the first plateau later.

    With the published weights, ``tiny`` learns for epochs what a single frame tells before it sees motion
    (docs/model.md).

    Args:
        model: its units' weights are fresh: of deviation ``INIT_STD``.
        steps: residual steps from the stem to the head.
    """
    with torch.no_grad():
        for unit in model.modules():
            if isinstance(unit, Unit):
                gain = 1 / (INIT_STD * math.sqrt(unit.fc1.in_features))
                unit.fc1.weight.mul_(gain)
                unit.fc2.weight.mul_(gain / math.sqrt(steps))
                for name, table in unit.gate.named_parameters():
                    if name.startswith("table"):  # of a supernet's unit: one for each group count
                        table.mul_(TABLE_GAIN / (INIT_STD * math.sqrt(math.prod(unit.gate.window))))


class PosMLPVideo(nn.Module):
    """Backbone and classifier. Build one with ``posmlp.create_model``, which checks the arguments.

    Args:
        dims: channels of each of the four stages.
        depths: number of blocks of each stage.
        groups: channel groups S of each stage; must divide its channels.
        windows: window (t, h, w) of each stage.
        blocks: block type of each stage, a key of ``BLOCKS``.
        num_classes: length of the logits.
        drop_path: stochastic-depth rate of the last block; the rates rise linearly from 0 at the first.
        dropout: dropout rate before the classifier.
        stage4_stride: pixels of the clip from one token of the last stage to the next, 32 or 16.
        init: ``published`` or ``scaled`` (``scale_init``).
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        groups: Sequence[int],
        windows: Sequence[Window],
        blocks: Sequence[str],
        num_classes: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        stage4_stride: int = 32,
        init: str = "published",
    ):
        super().__init__()
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        strides = (1, 2, 2, stage4_stride // 16)
        self.stem = Stem(dims[0])
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            dim_in = dims[i - 1] if i else None
            drop_paths = rates[first : first + depth]
            self.stages.append(Stage(dim_in, dims[i], blocks[i], depth, groups[i], windows[i], drop_paths, strides[i]))
        self.norm = nn.LayerNorm(dims[-1])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(init_linear)
        if init == "scaled":
            scale_init(self, residual_steps(blocks, depths))

    def freeze(self) -> PosMLPVideo:
        """Prepare for inference: eval mode, no gradients of parameters, and results of parameters alone are kept.

        On CPUs in eager mode, blocks then merge their linear layers, expand their position tables and convert both to
        the dtype of the products only once. Changes of parameters have no effect until the next call of ``freeze``, or
        until ``train``, which ends it. For a model on a CPU, the process keeps freed memory from then on
        (``posmlp.model.cpu.keep_freed_memory``).

        Returns:
            The model to run: this one; for a supernet that of its own architecture, which shares its weights.
        """
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Block):
                module.frozen = {}
        if next(self.parameters()).device.type == "cpu":
            cpu.keep_freed_memory()
        return self

    def features(self, clip: Tensor) -> list[Tensor]:
        """Feature maps of the four stages, ``[B, C_i, T, H_i, W_i]`` with strides 4, 8, 16, 32 in space, 1 in time.

        With ``stage4_stride`` 16, the last one has the size of the third.

        Args:
            clip: ``[B, 3, T, H, W]``, normalised; any T, H and W.
        """
        x = self.stem(clip)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, clip: Tensor, boxes: Tensor | None = None, box_clip: Tensor | None = None) -> Tensor:
        """Logits of clips, or with boxes those of each box in them (action detection).

        A clip's logits are of the mean of its last feature map. A box's are of the map's mean over time, in the box:
        RoIAlign, then the largest value of its bins. Both use the same norm, dropout and linear layer.

        Args:
            clip: ``[B, 3, T, H, W]``, normalised; any T, H and W.
            boxes: ``[N, 4]``, x1 y1 x2 y2 as fractions of the clip's frames.
            box_clip: int64 ``[N]``, the clip of each box; required with boxes.

        Returns:
            ``[B, num_classes]``, or ``[N, num_classes]`` with boxes.

        Raises:
            ValueError: boxes without ``box_clip``.
        """
        x = self.features(clip)[-1]
        tokens = x.flatten(2).mT  # [B, tokens, C]
        tokens = F.layer_norm(tokens, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
        if boxes is None:
            return self.head(self.dropout(tokens.mean(1)))
        if box_clip is None:
            raise ValueError("boxes need box_clip, the number of each box's clip")
        maps = tokens.unflatten(1, x.shape[2:]).mean(1).permute(0, 3, 1, 2)  # [B, C, H, W]
        return self.head(self.dropout(roi_align(maps, boxes, box_clip).amax((2, 3))))
