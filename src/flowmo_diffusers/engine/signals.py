"""A polite request to stop."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType


PR_SET_PDEATHSIG = 1


class StopRequest:
    """
    Notes SIGTERM, so that a run can save and leave between two steps. As a context manager it puts the former handler
    back.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._former = signal.signal(signal.SIGTERM, self._note)
        # The launcher of one process dies of SIGTERM without passing it on; the kernel does it instead.
        if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGTERM, self._former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def follow_parent(worker: int = 0) -> None:
    """
    For a worker of a run, which then ends with the run, or when the run ends it, and not before: SIGTERM to every
    process of a job (systemd and Slurm send it so) is the run's to answer, which still needs its workers for a step.
    """
    if hasattr(signal, "sigtimedwait"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    # PyTorch's workers take the process that forked them for their run, which it is not with a fork server.
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        received = signal.sigtimedwait([signal.SIGTERM], 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
