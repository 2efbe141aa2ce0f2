"""A cluster as users start it: ``ray start`` for a head and further nodes, here all on this machine."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "f" * 51 + "00000"  # the head's id in Ray's node provider for tests
RAY = str(Path(sys.executable).parent / "ray")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayNodes:
    """A head, and nodes that a test adds and kills or that an autoscaler starts.

    Each added node has its own temporary folder. The cluster requires a token.

    Attributes:
        address: for ``RAY_ADDRESS``.
        jobs: address of the job server, for ``ray job submit --address``.
        env: environment of a process that connects to the cluster.
    """

    def __init__(self, folder, cpus=0, node_types=None):
        """
        Args:
            cpus: number of CPUs of the head.
            node_types: the nodes that the autoscaler may start, as in ``available_node_types`` of ``cluster.yaml``.
                They are processes of this machine, through Ray's node provider for tests.
        """
        self.folder, self.nodes = Path(folder), {}
        port, dashboard = free_port(), free_port()
        self.address, self.jobs = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env |= {"PATH": f"{Path(sys.executable).parent}:{clean['PATH']}", "RAY_DISABLE_IMPORT_WARNING": "1"}
        self.env["RAY_USAGE_STATS_ENABLED"] = "0"
        # These export metrics on fixed ports by default, which another Ray may have.
        self.env |= {f"{part}_METRIC_PORT": str(free_port()) for part in ("DASHBOARD", "AUTOSCALER")}
        options = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--num-cpus={cpus}"]
        options.append('--system-config={"metrics_report_interval_ms": 1000}')
        if node_types:
            options.append(f"--autoscaling-config={self.write_config(node_types)}")
            self.env |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
            self.env |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID}
            # By default Ray Data's resource requests hold nodes for three minutes after a run was interrupted.
            self.env["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "20"
            self.env["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = HEAD_ID
            # On, as by default, because Ray Data then starts an actor for it; but nothing is sent.
            self.env |= {"RAY_USAGE_STATS_ENABLED": "1", "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9"}
        self.add("head", *options)
        for key in ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"):
            self.env.pop(key, None)
        with self.stopped_on_error():
            deadline = time.monotonic() + 120
            while not self.answers():
                assert self.nodes["head"].poll() is None and time.monotonic() < deadline, self.log("head")
                time.sleep(0.3)

    def write_config(self, node_types):
        provider = {"type": "external", "module": PROVIDER, "launch_multiple": True, "head_node_id": HEAD_ID}
        head = {"resources": {}, "node_config": {}, "max_workers": 0}
        config = {
            "cluster_name": "test",
            "max_workers": 8,
            "idle_timeout_minutes": 0.1,
            "provider": provider | {"gcs_address": self.address},
            "head_node_type": "ray.head.default",
            "available_node_types": {"ray.head.default": head, **node_types},
            "upscaling_speed": 10.0,
            "auth": {},
            "file_mounts": {},
        }
        config |= {f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")}
        config |= {f"{kind}_start_ray_commands": [] for kind in ("head", "worker")}
        config |= {"initialization_commands": [], "cluster_synced_files": [], "file_mounts_sync_continuously": False}
        path = self.folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        return path

    def add(self, name, *options, group=None):
        """Start a node with the labels ``name`` and ``group`` (the name if not given)."""
        place = self.folder / name
        place.mkdir(parents=True)
        where = options if "--head" in options else (f"--address={self.address}", *options)
        command = [
            RAY,
            "start",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--labels=group={group or name},name={name}",
            *where,
        ]
        command += [f"--dashboard-agent-listen-port={free_port()}"]  # the default may be another Ray's
        command += ["--object-store-memory=268435456", f"--temp-dir={place}"]
        with open(place / "log.txt", "w") as log:
            self.nodes[name] = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)

    def answers(self):
        with suppress(OSError):
            return bool(self.ask("/api/version"))
        return False

    def ask(self, path):
        """Request a path of the dashboard with the token; returns its answer."""
        request = urllib.request.Request(f"{self.jobs}{path}")
        request.add_header("Authorization", f"Bearer {self.env['RAY_AUTH_TOKEN']}")
        return json.load(urllib.request.urlopen(request, timeout=30))

    @property
    def discovery(self):
        """The service discovery file for Prometheus."""
        return self.folder / "head" / "prom_metrics_service_discovery.json"

    def scrape(self):
        """The samples that all nodes export, which needs no token."""
        (found,) = json.loads(self.discovery.read_text())
        texts = []
        for target in found["targets"]:
            with suppress(OSError):  # a node that was lost
                texts.append(urllib.request.urlopen(f"http://{target}/metrics", timeout=30).read().decode())
        return [each for text in texts for family in text_string_to_metric_families(text) for each in family.samples]

    def wait(self):
        """Wait until all nodes have joined."""
        with self.stopped_on_error():
            deadline = time.monotonic() + 300
            while {*self.names().values()} != {*self.nodes}:
                assert time.monotonic() < deadline, "\n".join(map(self.log, self.nodes))
                time.sleep(0.2)

    @contextmanager
    def stopped_on_error(self):
        """No node outlives an error in the block, where a fixture has not yet given the cluster to a test."""
        try:
            yield
        except BaseException:
            self.stop()
            raise

    def listing(self, kind):
        """The rows of ``ray list nodes``, ``actors``, ``tasks``, ``placement_groups`` and so on."""
        return self.ask(f"/api/v0/{kind}?limit=10000&detail=True")["data"]["result"]["result"]

    def names(self):
        """The names of the live nodes, by node id."""
        return {row["node_id"]: row["labels"].get("name") for row in self.listing("nodes") if row["state"] == "ALIVE"}

    def log(self, name):
        return (self.folder / name / "log.txt").read_text()

    def kill(self, name):
        """Kill a node, as if its machine was lost."""
        node = self.nodes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def stop(self):
        for name in [*self.nodes]:
            self.kill(name)
