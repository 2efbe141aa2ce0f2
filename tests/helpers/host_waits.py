"""What makes the host wait for a device, seen in PyTorch's own dispatch of operators."""

import sys
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posmlp.tasks import recognition

# On a GPU the host waits for the result of each of these. Below, ``lift_fresh`` is ``torch.tensor(...)``, whose copy it
# waits for too; the meta device does not show it.
READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "allclose", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "histc", "histogram", "_assert_async"),
}


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device, and the operators in all."""

    def __init__(self):
        super().__init__()
        self.reads, self.operators = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        name = function.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1 else ()
        by_mask = isinstance(indices, list) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        constant = (
            name == "lift_fresh" and args[0].ndim > 0
        )  # a single number is also lifted by x[0] = 1, which is no copy
        if name in READS or by_mask or unsized or constant:
            self.reads.append(str(function))
        return function(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Records the copies between devices, on the meta device: from where to where, and whether the host waits for it.

    A copy from the meta device gives ``value``, and fused optimizers do nothing. What asks for a value raises an error.
    """

    def __init__(self, value=0):
        super().__init__()
        self.value, self.found, self.optimizers = value, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if function in (aten._fused_adamw_.default, aten._fused_sgd_.default):  # not defined for meta tensors
            assert kwargs["found_inf"].device.type == "meta"
            self.optimizers.append(function)
            return None
        if function is aten.copy_.default:
            there, here = args[:2]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            result = (
                there.fill_(self.value) if (there.device.type, here.device.type) == ("cpu", "meta") else function(*args)
            )
        else:
            result = function(*args, **kwargs)
            if function is not aten._to_copy.default:
                return result
            here, waits = args[0], not kwargs.get("non_blocking", False)
        if here.device != result.device:
            self.found.append((here.device.type, result.device.type, waits))
        return result


def allow_meta_steps(monkeypatch):
    """Training steps work on the meta device, which has neither autocast nor fused optimizers."""
    monkeypatch.setattr(recognition, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
