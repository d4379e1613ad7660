"""What every training run shares: state that survives a stop, and options that mean what was written."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from flowmo_diffusers.engine.checkpoints import Progress, find_checkpoints, load_checkpoint, save_checkpoint
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.files import atomic_file, atomic_folder
from flowmo_diffusers.engine.norms import NormRescaler
from flowmo_diffusers.engine.options import parse_with_config
from flowmo_diffusers.engine.seeding import step_generator


# Exponential moving average


def walk(parameter: nn.Parameter, ema: EMA, steps: range) -> None:
    """A parameter that is the number of its step, and its average."""
    for step in steps:
        parameter.data.fill_(step + 1)
        ema.update([parameter], step)


@pytest.mark.parametrize("update_every", [1, 3, 10])
def test_ema_is_the_recurrence(update_every):
    """Catches a warm-up, a first update that copies the weights, decay of another power, or a shifted cadence."""
    parameter = nn.Parameter(torch.zeros(2))
    ema = EMA([parameter], decay=0.9, update_every=update_every)
    expected = 0.0
    for step in range(25):
        walk(parameter, ema, range(step, step + 1))
        if step % update_every == 0:
            expected = 0.9**update_every * expected + (1 - 0.9**update_every) * (step + 1)
        assert ema.shadow_params[0].tolist() == pytest.approx([expected] * 2, rel=1e-5), f"step {step}"


def test_ema_copies_what_is_frozen():
    """Catches an average that trails behind a frozen encoder, whose codes the decoder no longer sees."""
    moving, frozen = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)
    ema = EMA([moving, frozen], decay=0.9, update_every=1)
    moving.data.fill_(1)
    frozen.data.fill_(1)
    ema.update([moving, frozen], 0)
    assert [p.item() for p in ema.shadow_params] == pytest.approx([0.1, 1])


def test_ema_copy_to_and_restore():
    """Catches an export of the raw weights, or a validation after which training goes on from the averages."""
    parameter = nn.Parameter(torch.zeros(2))
    ema = EMA([parameter], decay=0.5, update_every=1)
    walk(parameter, ema, range(1))
    ema.store([parameter])
    ema.copy_to([parameter])
    assert parameter.tolist() == [0.5, 0.5]
    ema.restore([parameter])
    assert parameter.tolist() == [1, 1]
    assert ema.shadow_params[0].tolist() == [0.5, 0.5]


def test_ema_resumes():
    """Catches a resumed average that restarts from the raw weights, or that shares memory with what was saved."""
    parameter = nn.Parameter(torch.zeros(2))
    through = EMA([parameter], decay=0.9, update_every=3)
    walk(parameter, through, range(5))
    state = through.state_dict()
    resumed = EMA([nn.Parameter(torch.full((2,), 7.0))], decay=0.9, update_every=3)
    resumed.load_state_dict(state)
    walk(parameter, resumed, range(5, 20))
    walk(parameter, through, range(5, 20))
    assert torch.equal(resumed.shadow_params[0], through.shadow_params[0])
    assert resumed.state_dict().keys() == state.keys()


def test_ema_state_has_no_say_in_decay():
    """Catches an --ema_decay that a resumed run ignores, while --ema_update_every counts."""
    parameter = nn.Parameter(torch.zeros(1))
    resumed = EMA([parameter], decay=0.5, update_every=2)
    resumed.load_state_dict(EMA([parameter], decay=0.9, update_every=1).state_dict())
    walk(parameter, resumed, range(1))
    assert resumed.shadow_params[0].item() == pytest.approx(0.75)


def test_ema_state_stays_on_the_models_device():
    """Catches averages left on the CPU, where Accelerate loads them: the next update on a GPU would fail."""
    state = EMA([nn.Parameter(torch.zeros(2))]).state_dict()
    ema = EMA([nn.Parameter(torch.zeros(2, device="meta"))])
    ema.load_state_dict(state)
    assert ema.shadow_params[0].device.type == "meta"


@pytest.mark.parametrize("others", [[], [torch.zeros(3)], [torch.zeros(2), torch.zeros(2)]])
def test_ema_refuses_the_state_of_another_model(others):
    """Catches averages of another model that are taken over and surface at the next update or at the export."""
    state = EMA([nn.Parameter(other) for other in others]).state_dict()
    with pytest.raises(ValueError, match=f"state holds {len(others)} averages, which do not fit the 1 parameters"):
        EMA([nn.Parameter(torch.zeros(2))]).load_state_dict(state)


# Norm rescaling


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (2, 2), (1, 7))]


def test_norms_are_restored_and_directions_kept():
    """Catches a norm per row, a norm over all matrices, or a rescaling that is not a multiple of the matrix."""
    weights = matrices()
    initial = [weight.norm().item() for weight in weights]
    rescaler = NormRescaler(weights)
    with torch.no_grad():
        for i, weight in enumerate(weights):
            weight.add_(torch.randn_like(weight)).mul_(i + 2)
    moved = [weight.detach().clone() for weight in weights]
    rescaler.step()
    assert [weight.norm().item() for weight in weights] == pytest.approx(initial, rel=1e-6)
    for weight, before in zip(weights, moved, strict=True):
        torch.testing.assert_close(weight / weight.norm(), before / before.norm())


def test_norms_of_frozen_weights_are_left_alone():
    """Catches a frozen encoder whose weights change by rounding, and with them codes that are already stored."""
    weights = matrices()
    rescaler = NormRescaler(weights)
    weights[1].requires_grad_(False)
    with torch.no_grad():
        weights[0].mul_(2)
        weights[1].mul_(2)
    rescaler.step()
    assert weights[0].norm().item() == pytest.approx(rescaler.norms[0].item())
    assert weights[1].norm().item() == pytest.approx(2 * rescaler.norms[1].item())
    for weight in weights:
        weight.requires_grad_(False)
    rescaler.step()


def test_norms_under_training():
    """Catches a rescaling that autograd records, or parameters replaced by others the optimizer does not know."""
    weights = matrices()
    rescaler, optimizer = NormRescaler(weights), torch.optim.Adam(weights, lr=0.1)
    for _ in range(3):
        sum((weight - 1).square().sum() for weight in weights).backward()
        optimizer.step()
        moments = [optimizer.state[weight]["exp_avg"].clone() for weight in weights]
        rescaler.step()
        assert all(weight.is_leaf and weight.requires_grad and weight.grad is not None for weight in weights)
        assert all(torch.equal(optimizer.state[w]["exp_avg"], m) for w, m in zip(weights, moments, strict=True))
        optimizer.zero_grad()
    assert [optimizer.state[weight]["step"].item() for weight in weights] == [3, 3, 3]
    assert [w.norm().item() for w in weights] == pytest.approx([n.item() for n in rescaler.norms], rel=1e-6)


def test_norms_resume():
    """Catches a resumed run that holds the norms it started again with instead of the initial ones."""
    weights = matrices()
    state = NormRescaler(weights).state_dict()
    with torch.no_grad():
        for weight in weights:
            weight.mul_(3)
    resumed = NormRescaler(weights)
    resumed.load_state_dict(state)
    resumed.step()
    torch.testing.assert_close(torch.stack([weight.norm() for weight in weights]), state["norms"])
    with pytest.raises(ValueError, match="norms of 3 weights; this model has 2"):
        NormRescaler(weights[:2]).load_state_dict(state)


# Files


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_folder_takes_its_place_with_the_index_last(tmp_path, monkeypatch):
    """Catches a `model_index.json` that is there before the weights it points at, or other files that are lost."""
    target = tmp_path / "out"
    (target / "logs").mkdir(parents=True)
    (target / "logs" / "log").write_text("kept")
    (target / "model_index.json").write_text("old")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new)), replace(old, new)))
    with atomic_folder(target) as folder:
        assert folder.parent == target  # on one file system, so that renaming is atomic
        (folder / "model_index.json").write_text("new")
        (folder / "autoencoder" / "deep").mkdir(parents=True)
        (folder / "autoencoder" / "weights").write_text("w")
        (folder / "autoencoder" / "deep" / "file").write_text("d")
        assert (target / "model_index.json").read_text() == "old"
    assert content(target) == {
        "logs/log": "kept",
        "model_index.json": "new",
        "autoencoder/weights": "w",
        "autoencoder/deep/file": "d",
    }
    assert {path.relative_to(target).as_posix() for path in moved} == set(content(target)) - {"logs/log"}
    assert moved[-1] == target / "model_index.json"
    assert not list(target.glob(".partial-*"))


def test_folder_is_untouched_on_failure(tmp_path):
    """Catches a run that dies while it saves and takes the model of the run before with it."""
    (tmp_path / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="power cut"):
        with atomic_folder(tmp_path) as folder:
            (folder / "weights").write_text("ne")
            raise RuntimeError("power cut")
    assert content(tmp_path) == {"weights": "old"}
    assert list(tmp_path.iterdir()) == [tmp_path / "weights"]


def test_file(tmp_path):
    """Catches a picture or a checkpoint that is seen half written, or temporary files left behind."""
    target = tmp_path / "new" / "file.pth"
    for text in ("first", "second"):
        with atomic_file(target) as path:
            assert path.parent == target.parent and path.suffix == ".pth"
            path.write_text(text)
            assert not target.exists() or target.read_text() == "first"
        assert content(tmp_path) == {"new/file.pth": text}
    with pytest.raises(RuntimeError, match="power cut"):
        with atomic_file(target) as path:
            path.write_text("thi")
            raise RuntimeError("power cut")
    assert content(tmp_path) == {"new/file.pth": "second"}


# Checkpoints


def start() -> tuple[Accelerator, nn.Linear, torch.optim.Optimizer, Progress, EMA]:
    """A run at its beginning."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema, progress = EMA(model.parameters(), 0.9, 1), Progress()
    trained, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))
    accelerator.register_for_checkpointing(ema, progress)
    return accelerator, trained, optimizer, progress, ema


def advance(run, steps: int) -> None:
    accelerator, model, optimizer, progress, ema = run
    for _ in range(steps):
        x = torch.randn(4, 3, generator=step_generator(0, progress.step))
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model.parameters(), progress.step)
        progress.step += 1


@pytest.fixture
def run():
    yield start()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_resumed_run_is_the_run(run, tmp_path):
    """Catches weights, moments, averages or the step number missing from a checkpoint."""
    advance(run, 3)
    assert save_checkpoint(run[0], tmp_path, 3, None) == tmp_path / "checkpoint-3"
    advance(run, 4)
    for which in ("latest", str(tmp_path / "checkpoint-3")):
        resumed = start()
        assert load_checkpoint(resumed[0], tmp_path, which) == tmp_path / "checkpoint-3"
        assert resumed[3].step == 3
        advance(resumed, 4)
        for ours, theirs in zip(resumed[1].parameters(), run[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(resumed[4].shadow_params, run[4].shadow_params, strict=True):
            assert torch.equal(ours, theirs)


def test_rotation(run, tmp_path):
    """Catches checkpoints sorted as text, more of them than the limit, or the limit removing the newest."""
    for step in (8, 9, 10, 100):
        save_checkpoint(run[0], tmp_path, step, 2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    save_checkpoint(run[0], tmp_path, 101, None)
    assert len(find_checkpoints(tmp_path)) == 3


@pytest.mark.parametrize(("limit", "left"), [(1, [15]), (2, [15, 30]), (3, [15, 20, 30])])
def test_rotation_keeps_what_was_just_written(run, tmp_path, limit, left):
    """Catches a run resumed from an older checkpoint whose new ones are removed as the oldest as soon as written."""
    for step in (10, 20, 30):
        save_checkpoint(run[0], tmp_path, step, None)
    save_checkpoint(run[0], tmp_path, 15, limit)
    assert find_checkpoints(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in left]


def test_checkpoint_written_twice(run, tmp_path):
    """Catches a step that is reached again after resuming and whose checkpoint stays the first or mixes both."""
    save_checkpoint(run[0], tmp_path, 5, 1)
    (tmp_path / "checkpoint-5" / "stray").touch()
    run[3].step = 5
    save_checkpoint(run[0], tmp_path, 5, 1)
    assert not (tmp_path / "checkpoint-5" / "stray").exists()
    resumed = start()
    load_checkpoint(resumed[0], tmp_path, "latest")
    assert resumed[3].step == 5


def test_half_written_checkpoint_is_none(run, tmp_path, monkeypatch):
    """Catches a run that resumes from what was being written when it was killed, or keeps files of that attempt."""
    (tmp_path / "checkpoint-best").mkdir()
    assert load_checkpoint(run[0], tmp_path, "latest") is None
    with monkeypatch.context() as patch:
        patch.setattr(run[0], "save_state", lambda path: (Path(path).mkdir(), Path(path, "stray").touch(), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            save_checkpoint(run[0], tmp_path, 7, 1)
    assert find_checkpoints(tmp_path) == []
    assert load_checkpoint(run[0], tmp_path, "latest") is None
    save_checkpoint(run[0], tmp_path, 7, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7", "checkpoint-best"]
    assert not (tmp_path / "checkpoint-7" / "stray").exists()


def test_missing_checkpoint(run, tmp_path):
    """Catches a mistyped path that starts at step 0 without a word, or an error that does not tell what there is."""
    save_checkpoint(run[0], tmp_path, 7, 1)
    with pytest.raises(OSError, match=r"--resume_from_checkpoint .*checkpoint-8 does not exist.*\['.*checkpoint-7'\]"):
        load_checkpoint(run[0], tmp_path, str(tmp_path / "checkpoint-8"))


def _save_and_load(folder: Path) -> None:
    torch.set_num_threads(1)  # the pool of threads did not survive the fork
    run = start()
    assert run[0].num_processes == 2
    run[3].step = 2
    save_checkpoint(run[0], folder, 2, 1)
    save_checkpoint(run[0], folder, 4, 1)
    run[3].step = 0
    assert load_checkpoint(run[0], folder, "latest") == folder / "checkpoint-4"
    assert run[3].step == 2


def test_checkpoints_of_two_processes(tmp_path):
    """Catches processes that write one checkpoint twice, rename it too early or wait for each other for ever."""
    debug_launcher(_save_and_load, (tmp_path,), num_processes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "custom_checkpoint_1.pkl"} <= names


# Options


@pytest.fixture
def parse(tmp_path):
    """Parses a file's text and flags."""

    def parse(text: str, *flags: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        parser.add_argument("--stage", choices=["pretrain", "posttrain"], default="pretrain")
        parser.add_argument("--output_dir", type=Path, required=True)
        group = parser.add_argument_group("group")
        group.add_argument("--learning_rate", type=float, default=1.0)
        group.add_argument("--max_train_steps", type=int, default=10)
        group.add_argument("--precision", choices=["no", "bf16"])
        group.add_argument("--size", type=int, choices=[1, 2])
        group.add_argument("--name", default="x")
        group.add_argument("--model_config")
        group.add_argument("--random_flip", action=argparse.BooleanOptionalAction, default=True)
        group.add_argument("--center_crop", action="store_true")
        config = tmp_path / "config.yaml"
        config.write_text(text)
        return parse_with_config(parser, ["--config", str(config), *flags], section="stage")

    return parse


def test_flags_alone(tmp_path):
    """Catches a run without a file that needs one, or a --config that is not an option."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", choices=["pretrain"], default="pretrain")
    assert vars(parse_with_config(parser, [], section="stage")) == {"stage": "pretrain", "config": None}


def test_file_gives_defaults_and_flags_override(parse):
    """Catches a file that flags cannot override, or options that lose their own defaults."""
    text = "output_dir: out\nlearning_rate: 0.5\nrandom_flip: false\nname: 2012\nsize: 2\n"
    args = parse(text)
    assert (args.output_dir, args.learning_rate, args.random_flip) == (Path("out"), 0.5, False)
    assert (args.name, args.size, args.max_train_steps, args.center_crop) == ("2012", 2, 10, False)
    args = parse(text, "--output_dir", "other", "--learning_rate", "2", "--random_flip", "--name", "y", "--size", "1")
    assert (args.output_dir, args.learning_rate, args.random_flip) == (Path("other"), 2.0, True)
    assert (args.name, args.size) == ("y", 1)


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_numbers_take_the_options_type(parse, written):
    """Catches 1e-4, which YAML reads as text, reaching an optimizer as text; and whole numbers reaching it as int."""
    assert parse(f"output_dir: o\nlearning_rate: {written}").learning_rate == 1e-4
    rate = parse("output_dir: o\nlearning_rate: 2").learning_rate
    assert (rate, type(rate)) == (2.0, float)


def test_switches(parse):
    """Catches a switch that the file cannot turn on or off, or that the text "false" turns on."""
    assert parse("output_dir: o\ncenter_crop: true\nrandom_flip: true").center_crop is True
    assert parse("output_dir: o\ncenter_crop: true\nrandom_flip: no").random_flip is False
    assert parse("output_dir: o\ncenter_crop: false", "--center_crop").center_crop is True


def test_mappings(parse):
    """Catches a model's fields written as a YAML mapping that arrive as text or lose their types."""
    args = parse("output_dir: o\nmodel_config:\n  sample_size: 32\n  rope_axes: [4, 6, 6]\n")
    assert args.model_config == {"sample_size": 32, "rope_axes": [4, 6, 6]}


def test_sections(parse):
    """Catches a stage that gets another stage's values, or a section that the top of the file overrides."""
    text = (
        "output_dir: o\nlearning_rate: 1.5\n"
        "posttrain: {learning_rate: 2e-4, max_train_steps: 3}\npretrain: {learning_rate: 1e-3}\n"
    )
    args = parse(text)
    assert (args.stage, args.learning_rate, args.max_train_steps) == ("pretrain", 1e-3, 10)
    args = parse(text, "--stage", "posttrain")
    assert (args.stage, args.learning_rate, args.max_train_steps) == ("posttrain", 2e-4, 3)
    assert parse(text, "--stage=posttrain", "--learning_rate=7").learning_rate == 7
    args = parse(text + "stage: posttrain")
    assert (args.stage, args.learning_rate) == ("posttrain", 2e-4)
    assert parse("output_dir: o\nlearning_rate: 5\npretrain:\n").learning_rate == 5


def test_key_without_value(parse, capsys):
    """Catches an empty `output_dir:` that satisfies a required option, or replaces a number by `None`."""
    assert parse("output_dir: o\nlearning_rate:\n").learning_rate == 1.0
    with pytest.raises(SystemExit):
        parse("output_dir:\n")
    assert "required: --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "unknown keys ['learning_rte']"),
        ("pretrain: {learning_rte: 1}", "unknown keys ['learning_rte']"),
        ("config: other.yaml", "unknown keys ['config']"),
        ("1: 2\nno: 3", "unknown keys ['1', 'False']"),
        ("stage: distill", "stage='distill' must be one of ['pretrain', 'posttrain']"),
        ("size: 3", "size=3 must be one of [1, 2]"),
        ("precision: no", "precision=False is no switch: quote a word"),
        ("random_flip: 'false'", "random_flip='false' must be true or false"),
        ("center_crop: 1", "center_crop=1 must be true or false"),
        ("learning_rate: {a: 1}", "learning_rate={'a': 1} must be a single value"),
        ("learning_rate: fast", "--learning_rate: invalid float value: 'fast'"),
        ("max_train_steps: 1e4", "--max_train_steps: invalid int value: '1e4'"),
        ("just words", "the file must be a mapping of options to values"),
        ("pretrain: 3", "pretrain must be a mapping of options to values"),
        ("a: [", "config.yaml: while parsing"),
    ],
)
def test_file_errors(parse, capsys, text, message):
    """Catches a mistake in the file that is ignored, or that ends in a traceback instead of naming the key."""
    with pytest.raises(SystemExit):
        parse(text, "--output_dir", "o")
    assert message in capsys.readouterr().err


def test_missing_file(capsys):
    """Catches a mistyped --config that trains with the defaults."""
    with pytest.raises(SystemExit):
        parse_with_config(argparse.ArgumentParser(), ["--config", "nowhere.yaml"])
    assert "--config nowhere.yaml does not exist" in capsys.readouterr().err


# Random numbers


def test_step_generator():
    """Catches steps, processes or seeds that share their noise, and a step that depends on those before it."""
    places = [(seed, step, process) for seed in (0, 1, 2**40) for step in (0, 1, 2) for process in (0, 1, 2)]
    draws = [torch.rand(4, generator=step_generator(*place)) for place in places]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(places)
    for place, draw in reversed(list(zip(places, draws, strict=True))):
        assert torch.equal(torch.rand(4, generator=step_generator(*place)), draw)
    assert torch.equal(torch.rand(4, generator=step_generator(0, 0)), draws[0])
    state = torch.get_rng_state()
    step_generator(3, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_atomic_folder_leaves_no_older_layout(tmp_path):
    """Shards of an earlier save that survive beside a later, unsharded one and are loaded in its place."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights-1-of-2.safetensors").write_text("old")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events").write_text("kept")
    with atomic_folder(tmp_path) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights.safetensors").write_text("new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["weights.safetensors"]
    assert (tmp_path / "logs" / "events").read_text() == "kept"
