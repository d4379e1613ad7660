"""Options that mean what was written."""

import argparse
from pathlib import Path

import pytest

from flowmo_diffusers.engine.options import parse_with_config


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
        group.add_argument("--sides", type=int, nargs="+", default=[])
        group.add_argument("--metrics", nargs="*", choices=["psnr", "ssim"], default=["psnr"])
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


def test_base(parse, tmp_path):
    """Catches settings of a base that go before the file's own, a base looked for elsewhere, and mappings replaced."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "middle.yaml").write_text("base: ../first.yaml\nlearning_rate: 2\nsides: [1]\n")
    (tmp_path / "first.yaml").write_text(
        "output_dir: o\nlearning_rate: 1.5\nname: first\nmodel_config: {a: 1, b: 2}\nsides: [1, 2]\n"
        "pretrain: {max_train_steps: 3}\n"
    )
    args = parse("base: more/middle.yaml\nmodel_config: {b: 3}\nname:\npretrain: {size: 2}\n")
    assert (args.learning_rate, args.model_config, args.sides) == (2.0, {"a": 1, "b": 3}, [1])
    assert (args.max_train_steps, args.size, args.name) == (3, 2, "x")


def test_key_without_value(parse, capsys):
    """Catches an empty `output_dir:` that satisfies a required option, or replaces a number by `None`."""
    assert parse("output_dir: o\nlearning_rate:\n").learning_rate == 1.0
    with pytest.raises(SystemExit):
        parse("output_dir:\n")
    assert "required: --output_dir" in capsys.readouterr().err


def test_several_values(parse):
    """Catches a list that is taken for a mistake, or whose values keep the types of the file."""
    args = parse("sides: [1, '2']\nmetrics: []\n", "--output_dir", "o")
    assert args.sides == [1, 2] and args.metrics == []
    args = parse("sides: 3\nmetrics: [ssim]\n", "--output_dir", "o", "--sides", "4", "5")
    assert args.sides == [4, 5] and args.metrics == ["ssim"]
    assert parse("sides: 3\n", "--output_dir", "o").sides == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "unknown keys ['learning_rte']"),
        ("pretrain: {learning_rte: 1}", "unknown keys ['learning_rte']"),
        ("config: other.yaml", "unknown keys ['config']"),
        ("1: 2\nno: 3", "unknown keys ['1', 'False']"),
        ("stage: distill", "stage='distill' must be one of ['pretrain', 'posttrain']"),
        ("size: 3", "size=3 must be one of [1, 2]"),
        ("metrics: [psnr, fid]", "metrics='fid' must be one of ['psnr', 'ssim']"),
        ("sides: [1, x]", "sides: 'x' is no value of it"),
        ("precision: no", "precision=False is no switch: quote a word"),
        ("random_flip: 'false'", "random_flip='false' must be true or false"),
        ("center_crop: 1", "center_crop=1 must be true or false"),
        ("learning_rate: {a: 1}", "learning_rate={'a': 1} must be a single value"),
        ("learning_rate: fast", "--learning_rate: invalid float value: 'fast'"),
        ("max_train_steps: 1e4", "--max_train_steps: invalid int value: '1e4'"),
        ("just words", "the file must be a mapping of options to values"),
        ("pretrain: 3", "pretrain must be a mapping of options to values"),
        ("a: [", "config.yaml: while parsing"),
        ("base: config.yaml", "config.yaml is its own base"),
        ("base: nowhere.yaml", "No such file or directory"),
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
