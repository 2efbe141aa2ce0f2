"""What ``deploy/spot_notice.py`` makes of a cloud's notice; Ray's command is a script that notes how it is called."""

import os
import threading

import pytest

from tests.helpers.metadata_service import MetadataService, load_script
from tests.helpers.waiting import until

CLOUDS = ["aws", "gcp"]
RAY = """#!/bin/sh
echo "$RAY_ADDRESS $*" >> {log}
test $(wc -l < {log}) -gt {failures}
"""


@pytest.fixture
def script(monkeypatch):
    script = load_script()
    monkeypatch.setattr(script, "POLL_S", 0.01)
    monkeypatch.setattr(script, "RETRY_S", 0.01)
    return script


@pytest.fixture
def service():
    with MetadataService() as started:
        yield started


@pytest.fixture
def ray_calls(tmp_path, monkeypatch):
    """How the script has called ``ray``, which fails so many times at first."""

    def install(failures=0):
        (tmp_path / "ray").write_text(RAY.format(log=tmp_path / "log", failures=failures))
        (tmp_path / "ray").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        log = tmp_path / "log"
        return lambda: log.read_text().splitlines() if log.exists() else []

    return install


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_is_told_when_the_cloud_gives_notice(script, service, ray_calls, cloud):
    calls = ray_calls()
    arguments = [cloud, "10.0.0.1:6379", "--service", service.url]
    thread = threading.Thread(target=script.main, args=(arguments,), daemon=True)
    thread.start()
    until(lambda: service.asked > 3)
    assert thread.is_alive() and calls() == []
    service.give_notice(120)
    thread.join(60)
    (call,) = calls()
    address, command, *options = call.split(" ", 2)
    assert (address, command) == ("10.0.0.1:6379", "drain-node")
    assert "--address 10.0.0.1:6379 --reason DRAIN_NODE_REASON_PREEMPTION --reason-message" in options[0]
    seconds = int(call.rsplit("--deadline-remaining-seconds ", 1)[1])
    assert (20 < seconds <= 30) if cloud == "gcp" else (100 < seconds <= 120)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_service_that_fails_is_asked_again(script, service, ray_calls, cloud, capsys):
    calls = ray_calls()
    service.broken = True
    thread = threading.Thread(target=script.main, args=([cloud, "head:6379", "--service", service.url],), daemon=True)
    thread.start()
    until(lambda: service.asked > 2)
    service.give_notice(90)
    service.broken = False
    thread.join(60)
    assert len(calls()) == 1 and "no answer of the metadata service" in capsys.readouterr().out


def test_a_head_that_does_not_answer_is_told_again(script, service, ray_calls):
    calls = ray_calls(failures=2)
    service.give_notice(60)
    script.main(["aws", "head:6379", "--service", service.url])
    assert len(calls()) == 3


def test_a_notice_that_is_late_leaves_no_time(script, service):
    service.give_notice(-5)
    assert script.aws_notice(service.url) == 0


def test_without_a_service_there_is_no_notice(script):
    with MetadataService() as service:
        pass
    for notice in (script.aws_notice, script.gcp_notice):
        with pytest.raises(OSError):
            notice(service.url)
