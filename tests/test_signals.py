"""A run that is asked to stop hears it, under a launcher too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowmo_diffusers.engine.signals import StopRequest


RUN = """
import sys, time
from pathlib import Path
from flowmo_diffusers.engine.signals import StopRequest

folder = Path(sys.argv[1])
with StopRequest() as stop:
    (folder / "runs").touch()
    deadline = time.monotonic() + 30
    while not stop.requested and not (folder / "enough").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
(folder / ("saved" if stop.requested else "not asked")).touch()
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)


def test_sigterm_is_noted():
    """Catches a run that SIGTERM kills on the spot, or that stops without having been asked."""
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    with StopRequest() as stop:
        assert not stop.requested


def test_the_former_handler_is_put_back():
    """Catches a process that cannot be ended any more once training is over, or whose own handler is lost."""
    heard = []
    former = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        with pytest.raises(RuntimeError), StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError
        assert not heard
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [True]
    finally:
        signal.signal(signal.SIGTERM, former)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel passes on the death of a parent on Linux alone")
@pytest.mark.parametrize("launched", [True, False])
def test_death_of_the_launcher(tmp_path, launched):
    """Catches a run that outlives its launcher unseen, or one without a launcher that ends with its shell."""
    environment = os.environ | ({"ACCELERATE_MIXED_PRECISION": "no"} if launched else {})
    if not launched:
        environment.pop("ACCELERATE_MIXED_PRECISION", None)
    # With a command to follow, the shell stays the parent, and like a launcher dies of SIGTERM without a word.
    command = ["sh", "-c", '"$0" -c "$1" "$2"; true', sys.executable, RUN, str(tmp_path)]
    with subprocess.Popen(command, env=environment) as launcher:
        wait_for(tmp_path / "runs")
        launcher.terminate()
    assert launcher.returncode == -signal.SIGTERM
    if not launched:
        time.sleep(0.2)
        assert not (tmp_path / "saved").exists()
        (tmp_path / "enough").touch()
    wait_for(tmp_path / ("saved" if launched else "not asked"))
