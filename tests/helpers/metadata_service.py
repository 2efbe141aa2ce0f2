"""A stand-in for a cloud's metadata service on this machine, and ``deploy/spot_notice.py``."""

import importlib.util
import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "deploy" / "spot_notice.py"
AWS_TOKEN = "a token of now"


def load_script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("spot_notice", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Answers(BaseHTTPRequestHandler):
    """What AWS (IMDSv2) and Google Cloud answer, with and without a notice."""

    def do_PUT(self):
        lasts = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0))
        self.answer(200 if self.path == "/latest/api/token" and 0 < lasts <= 21600 else 400, AWS_TOKEN)

    def do_GET(self):
        service = self.server.service
        service.asked += 1
        if service.broken:
            self.answer(503, "")
        elif self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != AWS_TOKEN:
                self.answer(401, "")
            elif service.end is None:
                self.answer(404, "")
            else:
                self.answer(200, json.dumps({"action": "terminate", "time": f"{service.end:%Y-%m-%dT%H:%M:%SZ}"}))
        elif self.path == "/computeMetadata/v1/instance/preempted":
            known = self.headers.get("Metadata-Flavor") == "Google"
            self.answer(200 if known else 403, "FALSE" if service.end is None else "TRUE")
        else:
            self.answer(404, "")

    def answer(self, code, text):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


class MetadataService:
    """A metadata service that gives notice once a test says so.

    Attributes:
        end: when the machine is taken away; None: no notice.
        broken: it answers with errors.
        asked: number of questions so far.
    """

    def __init__(self):
        self.end, self.broken, self.asked = None, False, 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.server.service = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def give_notice(self, seconds):
        self.end = datetime.now(UTC) + timedelta(seconds=seconds)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
