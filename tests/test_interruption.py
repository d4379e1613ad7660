"""A run that is killed, stopped or short of disk is, once resumed, bit for bit the run that nothing happened to."""

import ctypes
import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import debug_launcher
from processes import START_METHOD
from safetensors.torch import load_file


if sys.platform != "linux":
    pytest.skip("kills, orphans and limits are those of Linux", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "training" / "train_flowmo.py"
TINY = {
    "sample_size": 32,
    "patch_size": 8,
    "num_latent_tokens": 4,
    "latent_channels": 6,
    "codebook_bits": 3,
    "encoder_num_layers": 1,
    "decoder_num_layers": 1,
    "encoder_hidden_size": 32,
    "decoder_hidden_size": 32,
    "num_attention_heads": 2,
    "rope_axes": [4, 6, 6],
}
OPTIONS = {
    "model_config": json.dumps(TINY),
    "perceptual": "none",
    "guard": "psnr",
    "learning_rate": 1e-3,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 8,
    "random_scale": 1.2,
    "ema_decay": 0.5,
    "ema_update_every": 1,
    "mixed_precision": "no",
    "num_validation_images": 3,
    "num_inference_steps": 2,
    "validation_steps": 2,
    "checkpointing_steps": 1,
    "logging_steps": 1,
}
CHECKPOINT_FILES = {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "run.json", "run_state.pt"}
PR_SET_CHILD_SUBREAPER = 36


def arguments(folder: Path, **options: Any) -> list[str]:
    argv = ["--output_dir", str(folder)]
    for name, value in (OPTIONS | options).items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


# Processes that run the script


class Running(Protocol):
    """A run of the script in a process of its own."""

    pid: int
    log_file: Path

    def ended(self, timeout: float = 0.0) -> bool:
        """Whether it has come to an end, or does within so many seconds."""

    def exit_code(self) -> int:
        """As `subprocess` has it: negative for a signal."""


def log_of(run: Running) -> str:
    return run.log_file.read_text()


def wait(run: Running, timeout: float = 60) -> int:
    assert run.ended(timeout), f"still running after {timeout} s: {log_of(run)[-3000:]}"
    return run.exit_code()


def completes(run: Running) -> None:
    assert wait(run) == 0, log_of(run)[-3000:]


def wait_until(what: Callable[[], Any], run: Running, timeout: float = 60) -> None:
    """Until it is true of a run that goes on."""
    deadline = time.monotonic() + timeout
    while not what():
        assert not run.ended(0.001), f"ended by itself with {run.exit_code()}: {log_of(run)[-3000:]}"
        assert time.monotonic() < deadline, f"not within {timeout} s: {log_of(run)[-3000:]}"


@dataclass
class Forked:
    """A run by a [`Server`]."""

    pid: int
    log_file: Path
    pipe: Connection
    code: int | None = None

    def ended(self, timeout: float = 0.0) -> bool:
        if self.code is None and self.pipe.poll(timeout):
            self.code = self.pipe.recv()
        return self.code is not None

    def exit_code(self) -> int:
        return self.code


@dataclass
class Launched:
    """A run by a command."""

    process: subprocess.Popen
    log_file: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def ended(self, timeout: float = 0.0) -> bool:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def exit_code(self) -> int:
        return self.process.returncode


class Server:
    """A process that has imported everything once, and forks one run of the script after the other."""

    def __init__(self, folder: Path, images: Path):
        context = multiprocessing.get_context(START_METHOD)
        self.folder = folder
        self.images = images
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        self.runs: list[Forked] = []

    def start(self, folder: Path, processes: int = 1, **options: Any) -> Forked:
        log_file = self.folder / f"log-{len(self.runs)}"
        log_file.touch()
        argv = arguments(folder, **{"train_data_dir": self.images} | options)
        self.pipe.send((argv, log_file, processes))
        self.runs.append(Forked(self.pipe.recv(), log_file, self.pipe))
        return self.runs[-1]

    def close(self) -> bool:
        """Whether no process was left behind by any run."""
        for run in self.runs[-1:]:
            if not run.ended():
                os.kill(run.pid, signal.SIGKILL)
                run.ended(10)
        self.pipe.send(None)
        clean = self.pipe.recv()
        self.process.join()
        return clean


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)  # no pool of threads, which a fork would not have
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    multiprocessing.set_start_method("fork", force=True)  # of the runs' workers, which need not import all of it anew
    importlib.import_module("torch.utils.tensorboard")  # as every run would
    spec = importlib.util.spec_from_file_location("train_flowmo", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    while (request := pipe.recv()) is not None:
        pid = os.fork()
        if pid == 0:
            _run(script, *request)
        pipe.send(pid)
        # It stays a zombie, so that its number is not given to another while someone may still kill it.
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        pipe.send(result.si_status if result.si_code == os.CLD_EXITED else -result.si_status)
    pipe.send(_all_ended(time.monotonic() + 20))


def _run(script, argv: list[str], log_file: Path, processes: int) -> None:
    code = 1
    try:
        descriptor = os.open(log_file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        args = script.parse_args(argv)
        if processes == 1:
            script.main(args)
        else:
            debug_launcher(script.main, (args,), num_processes=processes)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _all_ended(deadline: float) -> bool:
    """Whether all children have, and all whose parents were killed, which have become ours."""
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:
            return True
    return False


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(24):
        pixels = generator.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, images) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("logs"), images)
    yield server
    assert server.close(), "processes of a run have outlived it"


@contextmanager
def launched(
    folder: Path, images: Path, log_file: Path, launcher: tuple[str, ...] = (), **options: Any
) -> Iterator[Launched]:
    """The script as a user starts it, a process group of its own."""
    command = [sys.executable, *launcher, str(SCRIPT), *arguments(folder, train_data_dir=images, **options)]
    with log_file.open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield Launched(process, log_file)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# What runs leave behind


def steps(folder: Path) -> list[int]:
    """Of the checkpoints."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def assert_whole(folder: Path) -> None:
    """Every checkpoint can be gone on from."""
    for step in steps(folder):
        checkpoint = folder / f"checkpoint-{step}"
        assert {path.name for path in checkpoint.iterdir()} >= CHECKPOINT_FILES
        assert json.loads((checkpoint / "run.json").read_text())["step"] == step
        assert torch.load(checkpoint / "run_state.pt", weights_only=True)["progress"]["step"] == step
        assert torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
        assert load_file(checkpoint / "model.safetensors")


def loaded(path: Path) -> dict:
    """What must be the same of a file in which something need not be."""
    if path.name == "run_state.pt":
        state = torch.load(path, weights_only=True)
        del state["progress"]["seconds"]
    else:
        state = torch.load(path, weights_only=False)
        del state["step"]  # Accelerate's count of batches, which says nothing between two steps
    return state


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return np.array_equal(ours, theirs)


def assert_same(folder: Path, reference: Path) -> None:
    """
    The same to the bit: weights, best weights, figures, pictures, and the last checkpoint. Logs tell of every attempt,
    and the card of the time it took.
    """
    ours, theirs = (
        {
            path.relative_to(root)
            for path in root.rglob("*")
            if path.is_file() and not re.match(r"logs|README.md|checkpoint-", str(path.relative_to(root)))
        }
        for root in (folder, reference)
    )
    assert ours == theirs
    assert not list(folder.rglob(".partial-*"))
    last = steps(reference)[-1:]
    assert steps(folder)[-1:] == last
    for step in last:
        ours |= {path.relative_to(folder) for path in (folder / f"checkpoint-{step}").iterdir()}
    assert "README.md" in {path.name for path in folder.iterdir()}
    for path in ours:
        if path.name == "run_state.pt" or path.name.startswith("random_states"):
            assert equal(loaded(folder / path), loaded(reference / path)), path
        else:
            assert (folder / path).read_bytes() == (reference / path).read_bytes(), path


# Killed


def half_written(folder: Path) -> set[str]:
    """Kinds of what is there under a temporary name. A checkpoint that is older than another is being removed."""
    kinds = set()
    for name, kind in (("", "export"), ("best", "best"), ("validation", "picture")):
        entries = os.listdir(folder / name) if (folder / name).is_dir() else []
        whole = [int(entry[len("checkpoint-") :]) for entry in entries if entry.startswith("checkpoint-")]
        for entry in entries:
            if entry.startswith(".partial-checkpoint-"):
                removed = int(entry[len(".partial-checkpoint-") :]) < max(whole, default=0)
                kinds.add("removal" if removed else "checkpoint")
            elif entry.startswith(".partial-"):
                kinds.add(kind)
    return kinds


def kill(run: Forked, folder: Path, aim: str, seconds: float, chance: random.Random) -> str | None:
    """
    Kills the run at any moment of so many seconds, or while something of this kind is written.

    Returns:
        Where it fell, `None` if the run had come to its end.
    """
    if aim == "any moment":
        if run.ended(chance.uniform(0, seconds)):
            return None
    else:
        while "held out" not in log_of(run):  # what is left of earlier kills is removed before
            if run.ended(0.001):
                return None
        # Some checkpoints are let through, else no run would come further than its first.
        sightings, before = (chance.randrange(3) if aim == "checkpoint" else 0), False
        while sightings >= 0:
            if run.ended(0.0003):
                return None
            now = aim in half_written(folder)
            sightings -= now and not before
            before = now
        time.sleep(chance.uniform(0, 0.03 if aim == "checkpoint" else 0.003))
    os.kill(run.pid, signal.SIGKILL)
    if wait(run) == 0:
        return None
    assert run.exit_code() == -signal.SIGKILL, log_of(run)[-3000:]
    if "held out" not in log_of(run):
        return "start"
    return next(iter(half_written(folder)), "training")


SAVING = ["checkpoint"] * 3 + ["best", "picture", "export"]
KILLED = {
    # Its second step is the best, so that a best that is forgotten shows.
    "pretrain": (
        {"learning_rate": 0.1, "ema_decay": 0.6, "validation_steps": 1, "max_train_steps": 6},
        ["any moment"] * 5 + SAVING,
    ),
    "pretrain, frozen on the way": (
        {
            "dataloader_num_workers": 2,
            "checkpointing_steps": 2,
            "validation_steps": 1,
            "freeze_encoder_steps": 3,
            "lr_scheduler": "polynomial",
            "global_entropy": True,
            "max_grad_norm": 1.0,
        },
        ["any moment"] * 3 + SAVING,
    ),
    "posttrain": (
        {"stage": "posttrain", "perceptual": "lpips-alex", "chain_steps": 2, "max_train_steps": 5},
        ["any moment"] * 3 + SAVING,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed(server, tmp_path, name):
    """
    A run that goes on otherwise than it would have, or not at all, after SIGKILL at any moment: it drew other numbers,
    saw other images, lost part of its state, kept a better or worse best, or left something half written.
    """
    options, aims = KILLED[name]
    if options.get("stage") == "posttrain":
        completes(server.start(tmp_path / "pre", max_train_steps=1, validation_steps=0))
        options = options | {"model_config": None, "pretrained_model_name_or_path": tmp_path / "pre"}
    started = time.monotonic()
    completes(server.start(tmp_path / "whole", **options))
    seconds = time.monotonic() - started

    chance = random.Random(name)
    aims = chance.sample(aims, len(aims))
    planned, fell, folder, finished, attempts = len(aims), Counter(), tmp_path / "killed-0", 0, 0
    while aims:
        attempts += 1
        assert attempts < 6 * planned, f"kills fell on {dict(fell)}, none on {aims[0]}"
        run = server.start(folder, resume_from_checkpoint="latest", **options)
        where = kill(run, folder, aims[0], seconds, chance)
        if where is None:
            completes(run)
            assert_same(folder, tmp_path / "whole")
            finished += 1
            folder = tmp_path / f"killed-{finished}"
            continue
        fell[where] += 1
        assert_whole(folder)
        if aims[0] in ("any moment", where):
            aims.pop(0)
    completes(server.start(folder, resume_from_checkpoint="latest", **options))
    assert_same(folder, tmp_path / "whole")
    report = f"{name}: {fell.total()} kills fell on {dict(fell)}; {finished + 1} runs came to their end"
    print(report)
    assert fell.total() >= planned and fell.total() - fell["start"] - fell["training"] >= len(SAVING), report


# Asked to stop


def shown_step(run: Running) -> int:
    """What the progress bar has come to."""
    return int(re.findall(r" (\d+)/\d+ \[", log_of(run))[-1])


def stopped_at(run: Running, folder: Path) -> int:
    """The step that a run says it has saved, which is the only checkpoint that there is."""
    (step,) = re.findall(r"asked to stop: step (\d+) is saved, --resume_from_checkpoint latest goes on", log_of(run))
    assert steps(folder) == [int(step)]
    assert shown_step(run) == int(step)
    return int(step)


def assert_goes_on(server: Server, folder: Path, processes: int = 1, **options: Any) -> None:
    """Resumed from its last checkpoint, the run ends three steps later as if it had never been stopped."""
    last = steps(folder)[-1] + 3
    options |= {"max_train_steps": last, "checkpointing_steps": last}
    whole = folder.with_name("whole")
    completes(server.start(whole, processes, **options))
    completes(server.start(folder, processes, resume_from_checkpoint="latest", **options))
    assert_same(folder, whole)


NOT_SAVING = {"max_train_steps": 100_000, "checkpointing_steps": 100_000}


@pytest.mark.slow
def test_sigterm(server, images, tmp_path):
    """SIGTERM to every process of a job, as schedulers send it, that stops a run unsaved, late, or by its workers."""
    folder, options = tmp_path / "stopped", {"dataloader_num_workers": 2}
    with launched(folder, images, tmp_path / "log", **options, **NOT_SAVING) as run:
        wait_until((folder / "validation" / "pretrain-0000004.png").exists, run)
        os.killpg(run.pid, signal.SIGSTOP)
        shown = shown_step(run)
        os.killpg(run.pid, signal.SIGTERM)
        os.killpg(run.pid, signal.SIGCONT)
        assert wait(run) == 0, log_of(run)[-3000:]
    assert 1 <= stopped_at(run, folder) - shown <= 2
    assert_goes_on(server, folder, **options)


TWO_ON_CPU = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: "no"
main_process_port: 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_launcher(server, images, tmp_path, processes):
    """A launcher that dies and leaves its processes unasked or killed, or processes that stop at different steps."""
    folder = tmp_path / "stopped"
    (tmp_path / "config.yaml").write_text(TWO_ON_CPU)
    how = ["--num_processes", "1", "--cpu"] if processes == 1 else ["--config_file", str(tmp_path / "config.yaml")]
    with launched(folder, images, tmp_path / "log", ("-m", "accelerate.commands.launch", *how), **NOT_SAVING) as run:
        wait_until((folder / "validation" / "pretrain-0000004.png").exists, run, 120)
        os.kill(run.pid, signal.SIGTERM)
        code = wait(run)
        assert code == -signal.SIGTERM if processes == 1 else code != 0
        deadline = time.monotonic() + 60
        while "asked to stop" not in log_of(run):  # the launcher of one process does not wait for it
            assert time.monotonic() < deadline, log_of(run)[-3000:]
            time.sleep(0.01)
    stopped_at(run, folder)
    assert_goes_on(server, folder, processes)


WORKERS = """
import sys
from torch.utils.data import DataLoader
from flowmo_diffusers.engine.signals import follow_parent

options = {"num_workers": 2, "worker_init_fn": follow_parent, "multiprocessing_context": "forkserver"}
batches = iter(DataLoader(range(1000), **options))
print(*[worker.pid for worker in batches._workers], flush=True)
for line in sys.stdin:
    print(next(batches).item(), flush=True)
raise RuntimeError("the end")
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "fails"])
def test_workers(end):
    """
    Workers of a fork server (what Python 3.14 gives) that die of a SIGTERM meant for their run, outlive it, or keep it
    from ending.
    """
    command = [sys.executable, "-c", WORKERS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as run:
        watchdog = threading.Timer(60, os.killpg, (run.pid, signal.SIGKILL))
        watchdog.start()
        workers = [int(pid) for pid in run.stdout.readline().split()]
        for i in range(10):
            run.stdin.write("next\n")
            run.stdin.flush()
            assert run.stdout.readline() == f"{i}\n"
            for pid in workers if i > 0 else []:  # each has given something now: it is ready
                os.kill(pid, signal.SIGTERM)
        if end == "killed":
            run.kill()
        # Nothing more comes once all who could write are gone.
        assert run.communicate() == ("", None)
        assert watchdog.is_alive(), "not all ended by themselves"
        watchdog.cancel()
    assert run.returncode == (-signal.SIGKILL if end == "killed" else 1)
    assert len(workers) == 2


# A full disk


@contextmanager
def limited_files(folder: Path) -> Iterator[Callable[[int, bool], None]]:
    """A disk on which a process cannot write large files."""

    def fill(pid: int, full: bool) -> None:
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000 if full else hard, hard))

    yield fill


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int, bool], None]]:
    """A disk of its own, full to the last byte."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32M", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")

    def fill(pid: int, full: bool) -> None:
        filler = folder / "filler"
        if not full:
            return filler.unlink()
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def between_saves(run: Running, folder: Path) -> Iterator[None]:
    """The run stands still, and is not saving."""
    while True:
        os.kill(run.pid, signal.SIGSTOP)
        time.sleep(0.01)
        if not half_written(folder):
            break
        os.kill(run.pid, signal.SIGCONT)
        time.sleep(0.01)
    yield
    os.kill(run.pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize(("disk", "asked_to_stop"), [(limited_files, True), (small_disk, False)])
def test_full_disk(server, images, tmp_path, disk, asked_to_stop):
    """
    A full disk that ends a run at once or takes its checkpoints with it, is not spoken of, or keeps saves from
    succeeding when there is room again; a run that cannot save and goes on for good, or leaves as if it had, or never.
    """
    options = {"dataloader_num_workers": 2, "validation_steps": 0, "guard": "none"}
    running = options | {"max_train_steps": 100_000, "checkpointing_steps": 8}
    folder = tmp_path / "disk" / "out"
    with disk(tmp_path / "disk") as fill, launched(folder, images, tmp_path / "log", **running) as run:
        wait_until(lambda: 8 in steps(folder), run)
        with between_saves(run, folder):
            fill(run.pid, True)
            kept = steps(folder)
        wait_until(lambda: re.search(r"could not be written.*checkpoint-\d+\n", log_of(run)), run)
        fill(run.pid, False)
        line, failed = re.search(r".*checkpoint-(\d+) could not be written.*", log_of(run)).group(0, 1)
        assert line.endswith(f"the last good checkpoint is {folder / 'checkpoint-'}{kept[-1]}")
        assert set(kept) <= set(steps(folder))
        assert_whole(folder)
        wait_until(lambda: steps(folder)[-1] > int(failed), run)

        with between_saves(run, folder):
            fill(run.pid, True)
            kept = steps(folder)
            if asked_to_stop:
                os.kill(run.pid, signal.SIGTERM)
        assert wait(run) == 1
        last = shown_step(run)
        assert last - kept[-1] <= 8 if asked_to_stop else last - kept[-1] == 16, (
            "the second save that fails is too many"
        )
        assert f"stopped at step {last}; the last good checkpoint is {folder / 'checkpoint-'}{kept[-1]}" in log_of(run)
        # Not the error's name before it: a tracker's thread, whose disk is full too, may write between the two.
        assert f"checkpoint-{last} could not be written" in log_of(run)
        assert "asked to stop" not in log_of(run)
        assert steps(folder) == kept
        assert not list(folder.rglob(".partial-*"))
        assert_whole(folder)

        if disk is small_disk:
            fill(run.pid, False)
        assert_goes_on(server, folder, **options)


# What is refused, and what is finished


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SHORT = {"max_train_steps": 4, "checkpointing_steps": 2}


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory) -> Path:
    """A finished run, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    completes(server.start(folder, **SHORT))
    assert steps(folder) == [2, 4]
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"learning_rate": 0.002, "seed": 1},
            "checkpoint-4 is of another configuration: learning_rate is 0.001 there and 0.002 here; "
            "seed is 0 there and 1 here\n",
        ),
        (
            {"model_config": json.dumps(TINY | {"encoder_num_layers": 2}), "gradient_accumulation_steps": 1},
            "checkpoint-4 is of another configuration: joint_batch_size is 4 there and 2 here; "
            "model.encoder_num_layers is 1 there and 2 here\n",
        ),
        (
            {"resume_from_checkpoint": None},
            "holds checkpoints of another run, ['checkpoint-2', 'checkpoint-4']: --resume_from_checkpoint latest",
        ),
        ({"resume_from_checkpoint": "{copy}/checkpoint-2"}, "holds ['checkpoint-4'], newer than checkpoint-2"),
        ({"resume_from_checkpoint": "{copy}/checkpoint-3"}, "checkpoint-3 does not exist"),
        ({"train_data_dir": "{more}"}, "of a run on 21 training images, now there are 22"),
    ],
)
def test_refused(server, images, copy, tmp_path, options, message):
    """A run that goes on as another one, silently beside it, or on other images; and damage done before refusing."""
    more = shutil.copytree(images, tmp_path / "more")
    shutil.copy(more / "00.png", more / "24.png")
    before = content(copy)
    given = {
        name: value.replace("{copy}", str(copy)).replace("{more}", str(more)) if isinstance(value, str) else value
        for name, value in options.items()
    }
    run = server.start(copy, **SHORT | {"resume_from_checkpoint": "latest"} | given)
    assert wait(run) == 1
    assert message in log_of(run)
    assert content(copy) == before


def test_lost_best_weights(server, copy):
    """A resumed run whose best weights are gone, and that would end with those of a later, worse validation."""
    shutil.rmtree(copy / "best")
    run = server.start(copy, **SHORT, resume_from_checkpoint="latest")
    assert wait(run) == 1
    assert f"OSError: {copy / 'best'} is missing" in log_of(run)


def test_finished_run(server, finished, copy):
    """A resumed run that is over and yet goes on, fails, or ends with something else."""
    completes(server.start(copy, **SHORT, resume_from_checkpoint="latest"))
    assert_same(copy, finished)


def test_stopped_after_the_last_step(server, finished, copy):
    """A run whose last step is saved, but not its results, and that takes this for the end."""
    for name in ("model_index.json", "metrics.json", "README.md", "validation/pretrain-0000004.png"):
        (copy / name).unlink()
    shutil.rmtree(copy / "autoencoder")
    completes(server.start(copy, **SHORT, resume_from_checkpoint="latest"))
    assert_same(copy, finished)


def test_older_checkpoint(server, finished, copy, tmp_path):
    """An older checkpoint that cannot be gone on from once the newer ones are out of the way."""
    shutil.move(copy / "checkpoint-4", tmp_path / "aside")
    completes(server.start(copy, **SHORT, resume_from_checkpoint=copy / "checkpoint-2"))
    assert_same(copy, finished)


def test_stopped_early(server, tmp_path):
    """Patience that is not kept over a resume: a run that was stopped early and then goes on, or ends elsewhere."""
    options = {"learning_rate": 0.03, "early_stopping_patience": 2, "checkpointing_steps": 3, "max_train_steps": 100}
    completes(server.start(tmp_path / "whole", **options))
    last = max(int(path.stem[-7:]) for path in (tmp_path / "whole" / "validation").iterdir())
    best = json.loads((tmp_path / "whole" / "metrics.json").read_text())["steps"]
    assert 0 < best == last - 4 < 90
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "again")
    completes(server.start(folder, **options, resume_from_checkpoint="latest"))
    assert_same(folder, tmp_path / "whole")
