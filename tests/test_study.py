"""The study: every run can be run, and its page says what was recorded."""

import json
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from processes import forget_accelerators
from scripts import load_script

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.objectives.cost import posttraining_flops, pretraining_flops


ROOT = Path(__file__).parents[1]
STUDY = ROOT / "training" / "configs" / "study"
TINY = {
    "sample_size": 8, "patch_size": 4, "num_latent_tokens": 4, "latent_channels": 4, "codebook_bits": 2,
    "encoder_num_layers": 1, "decoder_num_layers": 1, "encoder_hidden_size": 16, "decoder_hidden_size": 16,
    "num_attention_heads": 1, "rope_axes": [4, 6, 6],
}  # fmt: skip


class InPlace(Executor):
    """Runs at once and here: training wants the main thread, for its signals."""

    def __init__(self, jobs: int):
        pass

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done


@pytest.fixture
def study():
    return load_script("run_study")


@pytest.fixture
def results():
    return load_script("build_results")


def tokenizer_options(name: str):
    path = STUDY / "tokenizer" / f"{name}.yaml"
    argv = ["--config", str(path), "--output_dir", "out", "--train_data_dir", "images"]
    return load_script("train_flowmo").parse_args(argv)


def test_every_tokenizer_can_be_trained():
    """Catches a run whose options do not parse, whose model cannot be built, or starts from none that is there."""
    names = {path.stem for path in (STUDY / "tokenizer").glob("*.yaml")}
    for name in names:
        args = tokenizer_options(name)
        assert args.guard == ("psnr" if name.startswith("hacked_1b") else "none"), name
        if args.pretrained_model_name_or_path:
            assert Path(args.pretrained_model_name_or_path).name in names and args.model_config is None
        else:
            FlowMoAutoencoder(**args.model_config)


def test_everything_else_parses():
    """Catches settings of evaluations, peers and generators that end a run after its training, or before it."""
    names = {path.stem for kind in ("tokenizer", "peers", "generator") for path in (STUDY / kind).glob("*.yaml")}
    for path in (STUDY / "evaluation").glob("*.yaml"):
        assert path.stem in names | {"all"}
        argv = ["--config", str(path), "--dataset", "d", "--pretrained_model_name_or_path", "m", "--output_dir", "out"]
        assert load_script("evaluate_reconstruction").parse_args(argv).num_images == 500
    for path in (STUDY / "evaluation" / "generator").glob("*.yaml"):
        argv = [
            "--config",
            str(path),
            "--reference",
            "r",
            "--pretrained_model_name_or_path",
            "m",
            "--output_dir",
            "out",
        ]
        args = load_script("evaluate_generation").parse_args(argv)
        assert args.pipeline_kwargs["num_inference_steps"] == int(path.stem.partition("_")[0])
        assert (args.num_samples, args.num_classes) == (1000, 10)
    for path in (STUDY / "generator").glob("*.yaml"):
        argv = ["--config", str(path), "--train_tokens_dir", "tokens", "--output_dir", "out"]
        args = load_script("train_generator").parse_args(argv)
        assert path.stem == f"generator_{args.max_train_steps}" and Path(args.tokenizer).name in names


def test_all_runs_have_the_same_budget():
    """Catches a run that is compared with others and sees more images, or takes more work, than they do."""
    images = {}
    for path in (STUDY / "tokenizer").glob("*.yaml"):
        args = tokenizer_options(path.stem)
        if args.stage == "pretrain" and not path.stem.startswith("one_step"):
            images[path.stem] = args.max_train_steps * args.train_batch_size
    for seed in ("", "_seed1"):
        images[f"mse_first{seed}"] += images.pop(f"mse_first_encoder{seed}")
    assert set(images.values()) == {96_000}
    base = FlowMoAutoencoder(**tokenizer_options("lo_1a").model_config)
    sizes = base.config, 32, 32
    chain = tokenizer_options("lo_1b").max_train_steps * posttraining_flops(*sizes, 8)
    for weight in ("0_1", "1", "10"):
        args = tokenizer_options(f"one_step_{weight}")
        assert args.perceptual_weight == float(weight.replace("_", "."))
        work = args.max_train_steps * pretraining_flops(*sizes, encoder_trained=False)
        assert work == pytest.approx(chain, rel=1e-3)
    assert base.num_parameters() / 1e6 == pytest.approx(1.3, abs=0.05) and base.bytes_per_image == 128
    for name, size in {"hi_1a": 384, "fsq": 128, "patch_4": 128, "width_5": 128}.items():
        assert FlowMoAutoencoder(**tokenizer_options(name).model_config).bytes_per_image == size


def test_two_runs(study, tmp_path, monkeypatch, capsys):
    """
    Catches a run that does not start from the other's weights, is run again when it is recorded, and records that are
    not what was measured.
    """
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "images" / split / f"{number}.png")
    first = {
        "model_config": TINY, "max_train_steps": 4, "train_batch_size": 2, "validation_steps": 2, "logging_steps": 1,
        "num_validation_images": 2, "perceptual": "none", "num_inference_steps": 1,
    }  # fmt: skip
    second = {"base": "first.yaml", "model_config": None, "pretrained_model_name_or_path": "study/first"}
    evaluation = {"split": "test", "resolution": 8, "metrics": []}
    files = {"tokenizer/first": first, "tokenizer/before": second, "evaluation/all": evaluation}
    files["evaluation/first"] = {"base": "all.yaml", "sweep": ["num_inference_steps=1,2"]}
    for name, content in files.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(study, "CONFIGS", tmp_path / "configs")
    calls = []

    def call(command, **options):
        """In this process: starting another one takes seconds."""
        script = load_script(Path(command[1]).stem)
        calls.append((Path(command[1]).stem, *command[2:]))
        forget_accelerators()
        script.main(script.parse_args(command[2:]))
        forget_accelerators()

    monkeypatch.setattr(study.subprocess, "run", call)
    monkeypatch.setattr(study, "ThreadPoolExecutor", InPlace)
    folders = ["--output_dir", str(tmp_path / "out"), "--results_dir", str(tmp_path / "results")]
    argv = ["--dataset", str(tmp_path / "images"), *folders]
    study.main(study.parse_args([*argv, "--runs", "before"]))
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["before.json"]
    assert [call[0] for call in calls] == ["train_flowmo", "train_flowmo", "evaluate_reconstruction"]
    assert str(tmp_path / "out" / "runs" / "first") in calls[1]
    study.main(study.parse_args(argv))
    assert len(calls) == 4 and calls[3][0] == "evaluate_reconstruction"
    record = json.loads((tmp_path / "results" / "first.json").read_text())
    measured = json.loads((tmp_path / "out" / "evaluations" / "first" / "metrics.json").read_text())
    assert [result["figures"] for result in record["results"]] == [r["figures"] for r in measured["results"]]
    assert record["config"]["model_config"] == TINY and record["training"]["images_per_second"] > 0
    assert [step for step, _ in record["training"]["curves"]["val/psnr"]] == [2, 4]
    study.main(study.parse_args(argv))
    assert len(calls) == 4
    with pytest.raises(SystemExit):
        study.parse_args([*argv, "--runs", "third"])
    assert "--runs ['third'] are none of ['before', 'first']" in capsys.readouterr().err


def test_the_page_is_what_was_recorded(results):
    """Catches tables that were edited by hand, or not made anew."""
    page = (ROOT / "docs" / "results.md").read_text()
    assert results.fill(page, results.Study.read(ROOT / "docs" / "results")) == page
    for name in results.PLOTS:
        assert f"(images/{name})" in page and (ROOT / "docs" / "images" / name).is_file()


def test_claims_name_runs(results):
    """Catches a claim or a table of a run that there is not."""
    names = {path.stem for kind in ("tokenizer", "peers") for path in (STUDY / kind).glob("*.yaml")}
    named = {run for claim in results.CLAIMS for run in claim.runs}
    assert named | results.STAGES.keys() | results.ABLATIONS.keys() | results.PEERS.keys() <= names


def record(*results: tuple[str, dict]) -> dict:
    return {"results": [{"name": name, "figures": figures} for name, figures in results]}


def test_comparisons(results):
    """Catches a claim that holds by the wrong sign, seeds left out, and settings mixed up."""
    study = results.Study(
        {
            "a": record(("a, rho 1.0, guidance_scale 1.5", {"rfid": 9.0}), ("a, rho 4.0, guidance_scale 1.5",
                        {"rfid": 5.0, "psnr": 20.0}), ("a, rho 4.0, guidance_scale 1.0", {"rfid": 6.0})),
            "b": record(("b", {"rfid": 3.0, "psnr": 21.0})),
            "b_seed1": record(("b_seed1", {"rfid": 4.0, "psnr": 18.0})),
        }
    )  # fmt: skip
    assert study.text("b", "rfid", study.seeds("b")) == "3.5 ± 0.5" and study.mean("b", "psnr", ["", "_seed1"]) == 19.5
    assert (study.mean("a", "rfid", rho=1.0), study.mean("a", "rfid", guidance_scale=1.0)) == (9, 6)
    assert study.seeds("a", "b") == [""], "a seed is compared with another one"
    text, holds = results.compare("a", "b", {"rfid": True, "psnr": True}, continued=True)(study)
    assert (text, holds) == ("rfid 5.0 → 3.0; psnr 20.00 → 21.00", True)
    assert results.compare("a", "b", {"rfid": True})(study)[1] is True
    assert results.compare("a", "b", {"psnr": True})(study)[1] is None, "two seeds differ by 3 dB"
    assert results.compare("a", "b", {"rfid": False, "psnr": True})(study)[1] is False
    assert results.compare("a", "b", {"rfid": True, "psnr": False}, continued=True)(study)[1] is False
    assert results.compare("b", "a", {"rfid": True})(study)[1] is False


def test_widths(results):
    """Catches widths out of order that hold, and a difference between the ends that two seeds can make."""

    def verdict(*rfids: float):
        runs = zip(("width_2", "lo_1a", "width_4", "width_5", "a", "a_seed1"), (*rfids, 1.0, 5.0), strict=True)
        return results.widths(results.Study({run: record((run, {"rfid": rfid})) for run, rfid in runs}))[1]

    assert verdict(9.0, 8.0, 7.0, 4.0) is True
    assert verdict(9.0, 8.0, 7.0, 6.0) is None
    assert verdict(9.0, 7.0, 8.0, 4.0) is False


def test_peers_are_means_over_seeds(results):
    """Catches a seed left out of the table or of the plot, and a codec's figures taken for a model's."""
    first, second = ({"bits_per_pixel": 1.0} | dict.fromkeys(results.SHOWN, value) for value in (2.0, 4.0))
    study = results.Study(
        {"lo_1b": record(("lo_1b", first), ("jpeg, 128 bytes", first)), "lo_1b_seed1": record(("", second))}
    )
    model, codec = results.peers_rows(study)
    assert (model["group"], model["figures"]["psnr"], model["text"]["psnr"]) == ("FlowMo", 3.0, "3.00 ± 1.00")
    assert (codec["group"], codec["figures"]["psnr"], codec["text"]["psnr"]) == ("jpeg", 2.0, "2.00")


def guarded(kept: int, psnr: list[float], distance: list[float]) -> dict:
    curves = {f"val/{name}": list(enumerate(values)) for name, values in (("psnr", psnr), ("lpips-alex", distance))}
    training = {"steps": kept, "images_per_second": 2.0, "curves": curves}
    return {"training": training, "config": {"train_batch_size": 60}}


def test_a_guarded_run(results):
    """Catches hacking seen where there is none, a guard that kept other weights, and half of a training's cost."""
    psnr, distance = [20.0, 22.0, 21.0], [0.3, 0.2, 0.1]

    def holds(*run) -> bool:
        return results.hacking(results.Study({"hacked_1b": hacking, "hacked_1b_fast": guarded(*run)}))[1]

    hacking = guarded(1, psnr, distance)
    assert holds(1, psnr, distance)
    assert not holds(2, psnr, distance), "another step was kept"
    assert not holds(2, [20.0, 21.0, 22.0], distance), "PSNR rises to the end"
    assert not holds(1, psnr, [0.3, 0.2, 0.2]), "what is optimised improves no more"
    assert results.cost(hacking) == (2, 1.0)
