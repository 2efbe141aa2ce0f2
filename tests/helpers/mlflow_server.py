"""An MLflow server in a process of its own, over a SQLite file and a folder of artifacts."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

from tests.helpers.waiting import until


class MlflowServer:
    """A server that can be killed and started again on the same port and database.

    Attributes:
        uri: its address.
        database: its SQLite file.
        process: the running server, or None.
    """

    def __init__(self, folder, database=None, artifacts=None):
        """
        Args:
            folder: for the log, and for the database and the artifacts if they are not given.
            database: path of the SQLite file.
            artifacts: path of the folder of artifacts.
        """
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = database or folder / "mlflow.db"
        self.artifacts = artifacts or folder / "artifacts"
        self.process = None

    def start(self):
        """Start the server unless it runs, and wait until it answers."""
        if self.process:
            return
        options = f"--host 127.0.0.1 --port {self.port} --workers 1 --backend-store-uri sqlite:///{self.database}"
        options += f" --artifacts-destination {self.artifacts}"
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # which triples the time of a start
        command = [sys.executable, "-m", "mlflow", "server", *options.split()]
        with open(self.folder / "log.txt", "a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        until(self.answers, 300)

    def answers(self):
        """Return whether the server is healthy. Fails if its process has ended."""
        assert self.process.poll() is None, (self.folder / "log.txt").read_text()
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self):
        """Kill the server, if it runs."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
