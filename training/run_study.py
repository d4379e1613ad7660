#!/usr/bin/env python
"""
Runs the study of docs/results.md: every configuration in training/configs/study is trained, measured on the same
images, and recorded in docs/results, from which training/build_results.py makes the page.

    python training/run_study.py --dataset cifar10 --output_dir study --jobs 2

What is recorded already is not run again; what was interrupted goes on where it was. Some runs start from others,
which are trained first where their weights are not there.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowmo_diffusers.engine.options import read_config_file
from flowmo_diffusers.metrics.report import environment, write_json


HERE = Path(__file__).parent
CONFIGS = HERE / "configs" / "study"
# How many images of each split become tokens for a generator.
TOKENS = {"train": 20_000, "test": 512}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", type=Path, required=True, help="CIFAR-10 as parquet files with splits train and test")
    add("--output_dir", type=Path, default=Path("study"), help="where weights, checkpoints and logs are kept")
    add("--results_dir", type=Path, default=HERE.parent / "docs" / "results", help="where finished runs are recorded")
    add("--runs", nargs="+", help="only these, in this order, and what they start from; default: all")
    add("--jobs", type=int, default=1, help="runs at the same time, which share the CPU's cores")
    add("--inception_weights", type=Path, help="local file, see evaluate_reconstruction.py")
    add("--lpips_weights", type=Path, help="local file, see evaluate_reconstruction.py")
    args = parser.parse_args(argv)
    known = {run.name for run in all_runs(args)}
    if unknown := sorted(set(args.runs or ()) - known):
        parser.error(f"--runs {unknown} are none of {sorted(known)}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    return args


class Run:
    """
    One configuration.

    Args:
        path: Of its YAML file.
        args: Of this script.
    """

    script = "train_flowmo.py"
    start_option = "pretrained_model_name_or_path"  # names the run that this one needs
    subject = "--pretrained_model_name_or_path"  # how the evaluation takes the result

    def __init__(self, path: Path, args: argparse.Namespace):
        self.path, self.args = path, args
        self.name = path.stem
        self.config = read_config_file(path)
        start = self.config.get(self.start_option)
        self.start = None if start is None else Path(start).name
        self.folder = args.output_dir / "runs" / self.name
        self.evaluation = args.output_dir / "evaluations" / self.name
        self.record = args.results_dir / f"{self.name}.json"
        self.lock = threading.Lock()

    def train(self, runs: dict[str, "Run"], threads: int) -> None:
        """Unless it is done; first of all what it starts from."""
        start = ()
        if self.start is not None:
            runs[self.start].train(runs, threads)
            start = (f"--{self.start_option}", runs[self.start].folder)
        with self.lock:
            if not (self.folder / "metrics.json").exists():
                data = self._data(runs, threads)
                common = ("--report_to", "tensorboard", "--resume_from_checkpoint", "latest")
                options = ("--config", self.path, *data, *start, "--output_dir", self.folder, *common)
                self._call(self.script, "train", threads, *options)

    def _data(self, runs: dict[str, "Run"], threads: int) -> Sequence[str | Path]:
        """Options of what it is trained on."""
        return "--train_data_dir", self.args.dataset

    def evaluate(self, threads: int) -> None:
        own = CONFIGS / "evaluation" / f"{self.name}.yaml"
        config = own if own.exists() else CONFIGS / "evaluation" / "all.yaml"
        options = ("--config", config, "--dataset", self.args.dataset, self.subject, self.folder)
        weights = self._weights("inception_weights", "lpips_weights")
        self._call(
            "evaluate_reconstruction.py", "evaluate", threads, *options, "--output_dir", self.evaluation, *weights
        )

    def results(self) -> list[dict[str, Any]]:
        """Names of settings and what they reached."""
        found = read_json(self.evaluation / "metrics.json")["results"]
        return [{"name": result["name"], "figures": result["figures"]} for result in found]

    def write(self) -> None:
        """The record: what was run, its course, what it reached."""
        record = {
            "run": self.name,
            "kind": self.path.parent.name,
            "config": self.config,
            "training": {**read_json(self.folder / "metrics.json"), **course(self.folder / "logs")},
            "results": self.results(),
            "cpus": os.cpu_count(),
            "environment": environment(torch.device("cpu")),
        }
        write_json(self.record, record)

    def _weights(self, *names: str) -> list[str | Path]:
        """Those of these options that were given."""
        given = {name: getattr(self.args, name) for name in names}
        return [part for name, path in given.items() if path is not None for part in (f"--{name}", path)]

    def _call(self, script: str, what: str, threads: int, *options: str | Path) -> None:
        log = self.args.output_dir / "logs" / f"{self.name}-{what}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{self.name}: {what}, see {log}", flush=True)
        with log.open("a") as file:
            command = [sys.executable, str(HERE / script), *map(str, options)]
            environ = {"OMP_NUM_THREADS": str(threads)} | os.environ
            subprocess.run(command, check=True, env=environ, stdout=file, stderr=subprocess.STDOUT)


class PeerRun(Run):
    """An autoencoder of another package."""

    script = "train_peer.py"
    subject = "--baseline"


class GeneratorRun(Run):
    """A generator on the tokens of a tokenizer of the study, measured at each number of steps."""

    script = "train_generator.py"
    start_option = "tokenizer"

    def _data(self, runs: dict[str, Run], threads: int) -> Sequence[str | Path]:
        tokenizer = runs[self.start]
        tokens = self.args.output_dir / "tokens" / tokenizer.name
        with tokenizer.lock:  # generators on the same tokens wait for each other here
            for split, count in TOKENS.items():
                if not (tokens / f"tokens-{split}.json").exists():
                    source = ("--dataset", self.args.dataset, "--split", split, "--num_images", str(count))
                    subject = ("--pretrained_model_name_or_path", tokenizer.folder)
                    self._call("tokenize_images.py", "tokens", threads, *subject, *source, "--output_dir", tokens)
        return "--train_tokens_dir", tokens

    def evaluate(self, threads: int) -> None:
        for config in sorted((CONFIGS / "evaluation" / "generator").glob("*.yaml")):
            options = ("--config", config, "--reference", self.args.dataset, self.subject, self.folder)
            out = ("--output_dir", self.evaluation / config.stem)
            weights = self._weights("inception_weights")
            self._call("evaluate_generation.py", f"evaluate-{config.stem}", threads, *options, *out, *weights)

    def results(self) -> list[dict[str, Any]]:
        folders = sorted(path.parent for path in self.evaluation.glob("*/metrics.json"))
        return [{"name": each.name, "figures": read_json(each / "metrics.json")["figures"]} for each in folders]


# By the folder of their configurations.
KINDS = {"tokenizer": Run, "peers": PeerRun, "generator": GeneratorRun}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def course(logs: Path) -> dict[str, Any]:
    """Of a training: its speed in images a second, and every figure of its validations by step."""
    events = EventAccumulator(str(next(logs.iterdir())), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    speeds = [event.value for event in events.Scalars("train/images_per_second")]
    curves = {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in tags if tag.startswith("val/")}
    return {"images_per_second": sum(speeds) / len(speeds), "curves": curves}


def all_runs(args: argparse.Namespace) -> list[Run]:
    """In the order of their dependence: what others start from comes first."""
    found = [kind(path, args) for folder, kind in KINDS.items() for path in sorted((CONFIGS / folder).glob("*.yaml"))]
    return sorted(found, key=lambda run: run.start is not None)


def main(args: argparse.Namespace) -> None:
    runs = {run.name: run for run in all_runs(args)}
    threads = max((os.cpu_count() or 1) // args.jobs, 1)

    def do(run: Run) -> None:
        run.train(runs, threads)
        run.evaluate(threads)
        run.write()
        print(f"{run.name}: done", flush=True)

    wanted = [runs[name] for name in args.runs or runs if not runs[name].record.exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {run.name: pool.submit(do, run) for run in wanted}
    failed = [f"{name} failed: {done.exception()}" for name, done in running.items() if done.exception() is not None]
    if failed:
        sys.exit("\n".join([*failed, f"see their logs in {args.output_dir / 'logs'}"]))


if __name__ == "__main__":
    main(parse_args())
