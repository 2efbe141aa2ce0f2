"""Tell Ray that this spot machine is about to be taken away, as soon as the cloud gives notice.

    python deploy/spot_notice.py aws 10.0.0.1:6379     # or gcp; the address of the cluster's head

Ray then starts nothing more on this machine, and a run saves a checkpoint and goes on elsewhere (docs/cluster.md). The
cloud's metadata service on each machine has the notice: two minutes before the end on AWS, 30 seconds on Google Cloud.
The script needs Python's standard library and Ray's command alone. It ends when Ray knows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import datetime

SERVICES = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
POLL_S = 5.0  # as AWS recommends
RETRY_S = 2.0  # after the head has not answered
ANSWER_LIMIT_S = 5.0  # for the metadata service, which is on the same machine
DRAIN_LIMIT_S = 30.0  # for Ray's command
GCP_NOTICE_S = 30


def ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """The answer of the metadata service; None if there is no such entry.

    Raises:
        OSError: it does not answer.
    """
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def aws_notice(service: str) -> int | None:
    """Seconds to the end of this machine; None without a notice."""
    token = ask(f"{service}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    headers = {"X-aws-ec2-metadata-token": token or ""}
    action = ask(f"{service}/latest/meta-data/spot/instance-action", headers)
    if action is None:
        return None
    end = datetime.fromisoformat(json.loads(action)["time"])  # in UTC, with a Z
    return max(0, int(end.timestamp() - time.time()))


def gcp_notice(service: str) -> int | None:
    """Seconds to the end of this machine, all of them, as the notice has no time; None without a notice."""
    preempted = ask(f"{service}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_S if preempted == "TRUE" else None


def wait_for_notice(cloud: str, service: str) -> int:
    """Ask the cloud until it gives notice. Returns the seconds to the end of this machine."""
    notice = {"aws": aws_notice, "gcp": gcp_notice}[cloud]
    while True:
        try:
            seconds = notice(service)
        except (OSError, ValueError, KeyError) as error:
            print(f"no answer of the metadata service: {error!r}", flush=True)
            seconds = None
        if seconds is not None:
            return seconds
        time.sleep(POLL_S)


def drain(address: str, seconds: int) -> bool:
    """Mark this machine's Ray node as draining. Returns whether Ray's head knows it now.

    Args:
        address: of the head.
        seconds: to the end of the machine.
    """
    command = ["ray", "drain-node", "--address", address, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "the cloud takes the machine away", "--deadline-remaining-seconds", str(seconds)]
    try:  # without an id it is the node of this machine that has joined the cluster at RAY_ADDRESS
        return not subprocess.run(command, env=os.environ | {"RAY_ADDRESS": address}, timeout=DRAIN_LIMIT_S).returncode
    except subprocess.TimeoutExpired:
        return False


def main(arguments: list[str] | None = None) -> None:
    """Wait for the notice and tell Ray."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=SERVICES)
    parser.add_argument("address", help="of the cluster's head, HOST:PORT")
    parser.add_argument("--service", help="URL of the metadata service (default: the cloud's own)")
    args = parser.parse_args(arguments)
    seconds = wait_for_notice(args.cloud, args.service or SERVICES[args.cloud])
    end = time.monotonic() + seconds
    print(f"{datetime.now():%H:%M:%S} the cloud takes this machine away in {seconds} s", flush=True)
    while not drain(args.address, max(0, int(end - time.monotonic()))):
        time.sleep(RETRY_S)


if __name__ == "__main__":
    main()
