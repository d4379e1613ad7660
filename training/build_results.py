#!/usr/bin/env python
"""
Writes the tables and plots of docs/results.md from the records of training/run_study.py in docs/results. What stands
between `<!-- name -->` and `<!-- /name -->` is replaced, the text around it stays.

    python training/build_results.py
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.metrics.report import DISTORTIONS, FIGURES, plot_figures


DOCS = Path(__file__).parents[1] / "docs"
SEED = "_seed1"  # a run's second seed is the run of this name more
SHOWN = ("rfid", "psnr", "ssim", "lpips_vgg", "lpips_alex")

Figures = Mapping[str, float]
Verdict = bool | None  # None where seeds differ by more than what is compared


def over_seeds(figure: str, values: Sequence[float]) -> str:
    """The mean of a figure over seeds, and how far they are from it."""
    digits = 1 if figure == "rfid" else FIGURES[figure.removesuffix("_train")][0]
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{spread}"


@dataclass
class Study:
    """
    Args:
        records: What training/run_study.py wrote, by the name of the run.
    """

    records: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Study":
        return cls({path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))})

    def seeds(self, *runs: str) -> list[str]:
        """What is added to a run's name for its seeds, those of all these runs: they are compared seed by seed."""
        return [seed for seed in ("", SEED) if all(run + seed in self.records for run in runs)]

    def figures(self, run: str, **settings: float) -> Figures:
        """
        Of one seed.

        Args:
            settings: Of the sampler, where the run was measured with several; by default the model's own.

        Raises:
            KeyError: If there is no such record, or no such settings in it.
        """
        results = self.records[run]["results"]
        for result in results:
            words = dict(re.findall(r", (\w+) ([\d.]+)", result["name"]))
            own = {"rho": 4.0, "guidance_scale": 1.5} | settings
            if all(float(words.get(name, value)) == value for name, value in own.items()):
                return result["figures"]
        raise KeyError(f"{run} was not measured with {settings}")

    def mean(self, run: str, figure: str, seeds: Sequence[str] = ("",), **settings: float) -> float:
        values = [self.figures(run + seed, **settings)[figure] for seed in seeds]
        return sum(values) / len(values)

    def differs(self, figure: str, one: str, other: str, seeds: Sequence[str] = ("",)) -> bool:
        """Whether two runs differ in a figure by more than any two seeds of one run do."""
        pairs = [(run, run + SEED) for run in self.records if run + SEED in self.records]
        between = max((abs(self.mean(a, figure) - self.mean(b, figure)) for a, b in pairs), default=0.0)
        return abs(self.mean(one, figure, seeds) - self.mean(other, figure, seeds)) > between

    def text(self, run: str, figure: str, seeds: Sequence[str] = ("",), **settings: float) -> str:
        return over_seeds(figure, [self.figures(run + seed, **settings)[figure] for seed in seeds])

    def curve(self, run: str, figure: str) -> list[tuple[int, float]]:
        return self.records[run]["training"]["curves"][f"val/{figure}"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def figures_table(study: Study, runs: Mapping[str, str], figures: Sequence[str] = SHOWN) -> str:
    """A row a run, of those that are there."""
    head = ["", *(f"{figure} {FIGURES[figure][1]}" for figure in figures)]
    there = {run: label for run, label in runs.items() if run in study.records}
    return table(
        head,
        [[label, *(study.text(run, figure, study.seeds(run)) for figure in figures)] for run, label in there.items()],
    )


# The claims: what the paper says, its figures, the runs it takes to see it, ours, and whether they say the same.


@dataclass
class Claim:
    """
    Args:
        text: What is claimed.
        paper: Its figures there.
        runs: Without which nothing can be said.
        ours: Our figures as text, and whether they point the same way.
    """

    text: str
    paper: str
    runs: Sequence[str]
    ours: Callable[[Study], tuple[str, Verdict]]


def better(figure: str, one: float, other: float) -> bool:
    """Whether `one` is better than `other`."""
    return one > other if FIGURES[figure][1] == "↑" else one < other


def all_hold(verdicts: Iterable[Verdict]) -> Verdict:
    """False if any is; else None if any is."""
    found = set(verdicts)
    return False if False in found else None if None in found else True


def compare(
    before: str, after: str, expected: Mapping[str, bool], continued: bool = False
) -> Callable[[Study], tuple[str, Verdict]]:
    """
    Figures of one run and of another.

    Args:
        expected: Whether each is better after.
        continued: Whether the other began with the weights of the one. Then no seed lies between them.
    """

    def ours(study: Study) -> tuple[str, Verdict]:
        seeds = study.seeds(before, after)
        texts, holds = [], []
        for name, improves in expected.items():
            texts.append(f"{name} {study.text(before, name, seeds)} → {study.text(after, name, seeds)}")
            right = better(name, study.mean(after, name, seeds), study.mean(before, name, seeds)) == improves
            holds.append(right if continued or study.differs(name, before, after, seeds) else None)
        return "; ".join(texts), all_hold(holds)

    return ours


def chain_against_one_step(study: Study) -> tuple[str, bool]:
    rivals = [name for name in study.records if name.startswith("one_step_")]
    best = min(rivals, key=lambda name: study.mean(name, "rfid"))
    pair = ("lo_1b", best)  # of the one seed that the rivals start from
    beside = "; ".join(f"{name} {' against '.join(study.text(run, name) for run in pair)}" for name in ALL_BETTER)
    ours = f"rfid with weights 0.1, 1, 10: {', '.join(study.text(name, 'rfid') for name in rivals)}; {beside}"
    return ours, all(better(name, *(study.mean(run, name) for run in pair)) for name in ALL_BETTER)


def perceptual_weights(study: Study) -> tuple[str, Verdict]:
    """At the weight that all runs have it may be too small to be seen, hence the larger one."""
    texts, hold = zip(
        *(compare(run, "no_perceptual", {"rfid": False, "psnr": True})(study) for run in ("lo_1a", "perceptual_1")),
        strict=True,
    )
    return f"from weight 0.1: {texts[0]}; from weight 1: {texts[1]}", hold[1]


def sampler(before: Mapping[str, float], after: Mapping[str, float]) -> Callable[[Study], tuple[str, bool]]:
    def ours(study: Study) -> tuple[str, bool]:
        seeds = study.seeds("lo_1a")
        pair = [
            (study.text("lo_1a", "rfid", seeds, **s), study.mean("lo_1a", "rfid", seeds, **s)) for s in (before, after)
        ]
        return f"rfid {pair[0][0]} → {pair[1][0]}", pair[1][1] < pair[0][1]

    return ours


def widths(study: Study) -> tuple[str, Verdict]:
    """Whether each is better than the one before, and the last clearly better than the first."""
    runs = ("width_2", "lo_1a", "width_4", "width_5")  # lo_1a has a width of 3
    values = [study.mean(run, "rfid") for run in runs]
    ends = compare(runs[0], runs[-1], {"rfid": True})(study)[1]
    return "rfid " + ", ".join(f"{value:.1f}" for value in values), all_hold([values == sorted(values)[::-1], ends])


def hacking(study: Study) -> tuple[str, bool]:
    """
    Whether PSNR falls from its best while what is optimised goes on improving, and the guard kept the best: with the
    larger weight alone, and with a larger learning rate too.
    """

    def ours(run: str) -> tuple[str, bool]:
        psnr, distance = dict(study.curve(run, "psnr")), dict(study.curve(run, "lpips-alex"))
        kept, last = study.records[run]["training"]["steps"], max(psnr)
        shown = [f"step {step}: {psnr[step]:.2f} dB, {distance[step]:.4f}" for step in (0, kept, last)]
        hacked = psnr[last] < psnr[kept] and distance[last] < distance[kept]
        return f"{shown[0]}; {shown[1]}, kept; {shown[2]}", hacked and psnr[kept] == max(psnr.values())

    texts, hold = zip(*(ours(run) for run in ("hacked_1b", "hacked_1b_fast")), strict=True)
    text = f"100 times the weight: {texts[0]}. 5 times the learning rate too: {texts[1]}"
    return f"PSNR, LPIPS-Alex (optimised). {text}", all(hold)


def manifolds(study: Study) -> tuple[str, bool]:
    names = ("precision", "recall", "precision_train", "recall_train")
    seeds = study.seeds("lo_1a", "lo_1b")
    before, after = ([study.mean(run, name, seeds) for name in names] for run in ("lo_1a", "lo_1b"))
    changes = (
        f"{name.replace('_train', ' (train)')} {study.text('lo_1a', name, seeds)} → {study.text('lo_1b', name, seeds)}"
        for name in names
    )
    return "; ".join(changes), after[0] > before[0] and after[1] > before[1] and after[3] < before[3]


ALL_BETTER = {"rfid": True, "psnr": True, "lpips_vgg": True}
CLAIMS = [
    Claim(
        "Stage 1B improves rFID, PSNR and LPIPS together (Lo)",
        "rFID 1.10 → 0.95, PSNR 21.38 → 22.07, LPIPS 0.134 → 0.113",
        ("lo_1a", "lo_1b"),
        compare("lo_1a", "lo_1b", ALL_BETTER, continued=True),
    ),
    Claim(
        "The same at the Hi rate",
        "rFID 0.73 → 0.56, PSNR 24.02 → 24.93, LPIPS 0.086 → 0.073",
        ("hi_1a", "hi_1b"),
        compare("hi_1a", "hi_1b", ALL_BETTER, continued=True),
    ),
    Claim(
        "Through the chain it beats the best one-step perceptual loss at the same compute",
        "rFID 1.28 against 1.60",
        ("lo_1b", "one_step_0_1", "one_step_1", "one_step_10"),
        chain_against_one_step,
    ),
    Claim(
        "Without the perceptual loss rFID is ruined while PSNR rises",
        "rFID 2.87 → 13.86, PSNR 20.71 → 22.11",
        ("lo_1a", "perceptual_1", "no_perceptual"),
        perceptual_weights,
    ),
    Claim(
        "Logit-normal noise without the thick tail loses PSNR and shifts colours",
        "PSNR 20.71 → 16.45",
        ("lo_1a", "logit_normal"),
        compare("lo_1a", "logit_normal", {"psnr": False, "colour_shift": False}),
    ),
    Claim("ρ = 4 beats ρ = 1", "rFID 3.42 → 2.87", ("lo_1a",), sampler({"rho": 1.0}, {"rho": 4.0})),
    Claim(
        "Guidance in its interval beats none",
        "rFID 3.28 → 2.87",
        ("lo_1a",),
        sampler({"guidance_scale": 1.0}, {"guidance_scale": 1.5}),
    ),
    Claim(
        "FSQ instead of LFQ: better PSNR, worse rFID",
        "rFID 2.87 → 3.14, PSNR 20.71 → 21.31",
        ("lo_1a", "fsq"),
        compare("lo_1a", "fsq", {"rfid": False, "psnr": True}),
    ),
    Claim(
        "A doubled patch is worse",
        "rFID 2.87 → 6.39, PSNR 20.71 → 19.94, LPIPS 0.15 → 0.17",
        ("lo_1a", "patch_4"),
        compare("lo_1a", "patch_4", dict.fromkeys(ALL_BETTER, False)),
    ),
    Claim(
        "An encoder trained with MSE first: better PSNR, worse rFID",
        "rFID 2.87 → 3.82, PSNR 20.71 → 21.40",
        ("lo_1a", "mse_first"),
        compare("lo_1a", "mse_first", {"rfid": False, "psnr": True}),
    ),
    Claim(
        "Wider is better, at widths of 2, 3, 4 and 5",
        "rFID 7.77, 5.31, 4.45, 3.84",
        ("lo_1a", "width_2", "width_4", "width_5"),
        widths,
    ),
    Claim(
        "A continuous latent is better than a discrete one",
        "rFID 0.95 → 0.65, PSNR 22.07 → 26.61",
        ("lo_1a", "continuous"),
        compare("lo_1a", "continuous", {"rfid": True, "psnr": True}),
    ),
    Claim(
        "A large sample weight hacks the reward, and the guard catches it",
        "told without figures",
        ("hacked_1b", "hacked_1b_fast"),
        hacking,
    ),
    Claim(
        "Mode seeking: against the originals precision and recall rise, against the training set recall falls",
        "0.974 / 0.988 → 0.993 / 0.991; 0.734 / 0.660 → 0.766 / 0.634",
        ("lo_1a", "lo_1b"),
        manifolds,
    ),
]


def claims_table(study: Study) -> str:
    rows = []
    for number, claim in enumerate(CLAIMS, 1):
        missing = [run for run in claim.runs if run not in study.records]
        ours, holds = ("not run yet", None) if missing else claim.ours(study)
        verdict = "" if missing else {True: "yes", False: "**no**", None: "**cannot be told**"}[holds]
        rows.append([str(number), claim.text, claim.paper, ours, verdict])
    return "\n".join(
        ["| | claim | paper | here | holds |", "|---:|---|---|---|---|", *("| " + " | ".join(r) + " |" for r in rows)]
    )


ABLATIONS = {
    "lo_1a": "stage 1A, Lo",
    "patch_4": "patch of 4",
    "mse_first": "encoder with MSE first",
    "no_perceptual": "no perceptual loss",
    "perceptual_1": "perceptual loss with weight 1",
    "fsq": "FSQ",
    "logit_normal": "logit-normal noise",
    "continuous": "continuous latent",
    "width_2": "width 2",
    "width_4": "width 4",
    "width_5": "width 5",
}
STAGES = {
    "lo_1a": "Lo after 1A",
    "lo_1b": "Lo after 1B",
    "one_step_0_1": "one step, weight 0.1",
    "one_step_1": "one step, weight 1",
    "one_step_10": "one step, weight 10",
    "hi_1a": "Hi after 1A",
    "hi_1b": "Hi after 1B",
}
PEERS = {
    "lo_1b": "FlowMo-Lo",
    "vq_lo": "VQModel",
    "vq_lo_lpips": "VQModel, LPIPS",
    "titok_lo": "TiTok",
    "titok_lo_lpips": "TiTok, LPIPS",
    "hi_1b": "FlowMo-Hi",
    "vq_hi": "VQModel",
    "vq_hi_lpips": "VQModel, LPIPS",
    "titok_hi": "TiTok",
    "titok_hi_lpips": "TiTok, LPIPS",
}


def peers_rows(study: Study) -> list[dict[str, Any]]:
    """All of both rates: name, group and figures, the means over seeds, and each figure as text."""
    rows = []
    for run, label in PEERS.items():
        for result in study.records[run]["results"] if run in study.records else ():
            codec = re.match(r"(jpeg|webp), \d+ bytes", result["name"])
            name = codec[1] if codec else label
            group, figures = re.sub("-Lo|-Hi", "", name), result["figures"]
            text = {figure: over_seeds(figure, [figures[figure]]) for figure in SHOWN}
            if not codec:
                seeds = study.seeds(run)
                text = {figure: study.text(run, figure, seeds) for figure in SHOWN}
                figures = {figure: study.mean(run, figure, seeds) for figure in figures}
            rows.append({"name": name, "group": group, "figures": figures, "text": text})
    return sorted(rows, key=lambda row: round(row["figures"]["bits_per_pixel"]))


def peers_table(study: Study) -> str:
    rows = []
    for row in peers_rows(study):
        figures = row["figures"]
        used = f"{figures['used_codes']:.0f} of {figures['usable_codes']:.0f}" if "used_codes" in figures else ""
        rows.append([row["name"], f"{figures['bits_per_pixel']:.2f}", *row["text"].values(), used])
    return table(["", "bits per pixel", *(f"{name} {FIGURES[name][1]}" for name in SHOWN), "codes used"], rows)


def hacking_rows(study: Study) -> list[dict[str, Any]]:
    """One for each validation of stage 1B as it should be, and hacked."""
    labels = {"lo_1b": "stage 1B", "hacked_1b": "100 times the weight", "hacked_1b_fast": "and 5 times the rate"}
    rows = []
    for run, label in labels.items():
        if run in study.records:
            distances = dict(study.curve(run, "lpips-alex"))
            for step, psnr in study.curve(run, "psnr"):
                figures = {"steps": step, "psnr": psnr, "lpips_alex": distances[step]}
                rows.append({"name": f"{label}, step {step}", "group": label, "figures": figures})
    return rows


def cost(record: Mapping[str, Any]) -> tuple[int, float]:
    """Steps and minutes of a training; of all of it where a guard kept weights from before its end."""
    training = record["training"]
    steps = max(step for curve in training["curves"].values() for step, _ in curve)
    return steps, steps * record["config"]["train_batch_size"] / training["images_per_second"] / 60


def generator_rows(study: Study) -> list[dict[str, Any]]:
    """One for each training and number of sampling steps."""
    rows = []
    for record in sorted((each for each in study.records.values() if each["kind"] == "generator"), key=cost):
        trained, minutes = cost(record)
        for result in record["results"]:
            group = f"{int(result['name'].partition('_')[0])} steps of sampling"
            figures = {"steps": trained, "minutes": minutes} | result["figures"]
            rows.append({"name": f"{trained} steps, {group}", "group": group, "figures": figures})
    return rows


def generator_table(study: Study) -> str:
    rows = []
    for row in generator_rows(study):
        figures = row["figures"]
        shown = (f"{figures['fid']:.1f}", f"{figures['precision']:.3f}", f"{figures['recall']:.3f}")
        rows.append([str(figures["steps"]), f"{figures['minutes']:.0f}", row["group"].partition(" ")[0], *shown])
    return table(["training steps", "minutes", "sampling steps", "FID ↓", "precision ↑", "recall ↑"], rows)


def costs_table(study: Study) -> str:
    """What each training took."""
    rows = []
    for name, record in study.records.items():
        steps, minutes = cost(record)
        rows.append([f"`{name}`", str(steps), f"{record['training']['images_per_second']:.0f}", f"{minutes:.0f}"])
    return table(["run", "steps", "images/s", "minutes"], rows)


BLOCKS: dict[str, Callable[[Study], str]] = {
    "claims": claims_table,
    "stages": lambda study: figures_table(study, STAGES),
    "ablations": lambda study: figures_table(study, ABLATIONS),
    "peers": peers_table,
    "generator": generator_table,
    "costs": costs_table,
}
# Pictures by their names: what is in them, against what, and which figures.
PLOTS: dict[str, tuple[Callable[[Study], list[dict[str, Any]]], str, Sequence[str]]] = {
    "study_peers.png": (peers_rows, "bits_per_pixel", DISTORTIONS),
    "study_hacking.png": (hacking_rows, "steps", ("psnr", "lpips_alex")),
    "study_generator.png": (generator_rows, "minutes", ("fid", "precision", "recall")),
}


def fill(page: str, study: Study) -> str:
    """The page with every block made anew. Raises `ValueError` if one is missing."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"the page has no block <!-- {name} --> ... <!-- /{name} -->")
        content = block(study)
        page = pattern.sub(lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", page)
    return page


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=DOCS / "results")
    parser.add_argument("--page", type=Path, default=DOCS / "results.md")
    parser.add_argument("--images_dir", type=Path, default=DOCS / "images")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    study = Study.read(args.results_dir)
    page = fill(args.page.read_text(), study)
    with atomic_file(args.page) as path:
        path.write_text(page)
    for name, (rows, against, figures) in PLOTS.items():
        if drawn := rows(study):
            plot_figures(drawn, args.images_dir / name, against, figures)


if __name__ == "__main__":
    main(parse_args())
