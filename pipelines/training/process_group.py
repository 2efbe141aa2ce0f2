"""The training workers' process group, whose store listens at the first worker's own address alone.

PyTorch's store, by which the workers find each other, accepts whoever connects, on every interface of the machine.
There is no setting for that, but it takes a socket that listens already.
"""

from __future__ import annotations

import importlib
import socket
from typing import Any

from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from torch.distributed import TCPStore


class ProcessGroupConfig(TorchConfig):
    """Ray Train's settings of the process group."""

    @property
    def backend_cls(self) -> type[Backend]:
        return ProcessGroupBackend


class ProcessGroupBackend(_TorchBackend):
    """Makes the group as Ray Train does, from a store as below."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(listen_at_own_address)
        super().on_start(worker_group, backend_config)


def listen_at_own_address() -> None:
    """In a worker: the store that it will make listens at the address that the others are told."""

    def store(host_name: str, port: int, is_master: bool = False, **options: Any) -> TCPStore:
        if is_master:
            family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
            with socket.create_server((host_name, port), family=family) as listener:
                options["master_listen_fd"] = listener.detach()
        return TCPStore(host_name=host_name, port=port, is_master=is_master, **options)

    # By its full name: torch.distributed has a function of the same name.
    importlib.import_module("torch.distributed.rendezvous").TCPStore = store
