"""The training workers' process group, whose store listens only at the address of the first worker.

The workers find each other through PyTorch's TCP store. By default it accepts connections from anyone, on every network
interface of the machine. It has no setting for the interface, but it accepts a socket that already listens.
"""

from __future__ import annotations

import importlib
import socket
from typing import Any

from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from torch.distributed import TCPStore


class ProcessGroupConfig(TorchConfig):
    """Ray Train's process group settings, with ``ProcessGroupBackend``."""

    @property
    def backend_cls(self) -> type[Backend]:
        return ProcessGroupBackend


class ProcessGroupBackend(TorchConfig().backend_cls):  # type: ignore[misc] # the class itself has a private name
    """Creates the process group as Ray Train does, after ``listen_at_own_address`` on every worker."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(listen_at_own_address)
        super().on_start(worker_group, backend_config)


def listen_at_own_address() -> None:
    """Make the store that this worker may start listen only at the address that the other workers connect to."""

    def store(host_name: str, port: int, is_master: bool = False, **options: Any) -> TCPStore:
        if is_master:
            family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
            with socket.create_server((host_name, port), family=family) as listener:
                options["master_listen_fd"] = listener.detach()
        return TCPStore(host_name=host_name, port=port, is_master=is_master, **options)

    # Imported by its full name, because torch.distributed has a function of the same name.
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    rendezvous.TCPStore = store
