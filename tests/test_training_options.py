"""Options that training scripts share, and what is made of them."""

import argparse

import pytest
import torch
from torch import nn

from flowmo_diffusers.engine.training_options import (
    FREE_OPTIONS,
    add_optimisation_options,
    add_publishing_options,
    add_run_options,
    add_validation_options,
    build_lr_scheduler,
    build_optimizer,
    check_options,
    course,
    read_config,
)


def parse(*argv: str, limits=None, rules=()) -> argparse.Namespace:
    """The options of a script that has one of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--guard", default="none")
    parser.add_argument("--own", type=int)
    add_optimisation_options(parser)
    add_validation_options(parser)
    add_run_options(parser)
    add_publishing_options(parser)
    args = parser.parse_args(argv)
    check_options(parser, args, limits or {}, rules)
    return args


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_train_steps", "0"], "--max_train_steps 0 must be at least 1"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--compile", "--activation_memory_budget", "1.5"], "--activation_memory_budget 1.5 must be from 0 to 1"),
        (["--activation_memory_budget", "0.5"], "--activation_memory_budget belongs to --compile"),
        (["--adam_beta2", "1"], "--adam_beta2 1.0 must be at least 0 and less than 1"),
        (["--max_grad_norm", "0"], "--max_grad_norm 0.0 must be positive"),
        (["--own", "-2"], "--own -2 must be at least 0"),
        (["--lr_power", "2"], "--lr_scheduler polynomial"),
        (["--lr_scheduler", "polynomial", "--lr_end", "1"], "--lr_end 1.0 is above --learning_rate 0.1"),
        (["--lr_warmup_steps", "5"], "constant_with_warmup"),
        (["--lr_scheduler", "cosine", "--lr_warmup_steps", "5", "--max_train_steps", "4"], "is more than --max_train"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience needs a --guard"),
        (["--early_stopping_patience", "2", "--guard", "x", "--validation_steps", "0"], "and --validation_steps"),
        (["--report_to", "clearml"], "--report_to clearml"),
    ],
)
def test_wrong_options(capsys, argv, message):
    """A wrong value or combination that no script would notice before it trains."""
    with pytest.raises(SystemExit):
        parse(*argv, limits={"at least 0": ("own",)})
    assert message in capsys.readouterr().err


def test_rules_of_a_script(capsys):
    """A script's own rule that is not asked, or is taken for broken when it is not."""
    parse(rules=[(None, "never said")])
    with pytest.raises(SystemExit):
        parse(rules=[(False, "never said"), ("text", "this is said")])
    assert "error: this is said" in capsys.readouterr().err


def test_course():
    """A run that may not be spread otherwise or made longer, or that may go on as another one."""
    facts = {"model.width": 8}
    config = course(parse(), 2, ("own",), facts)
    assert config["joint_batch_size"] == 8 and config["model.width"] == 8
    assert not (FREE_OPTIONS | {"own", "max_train_steps"}) & config.keys()
    spread = parse("--train_batch_size", "2", "--gradient_accumulation_steps", "4", "--own", "3")
    assert course(spread, 1, ("own",), facts) == config
    assert course(parse("--max_train_steps", "9"), 2, ("own",), facts) == config
    assert course(parse("--lr_scheduler", "linear"), 2, (), facts)["max_train_steps"] == 200_000
    assert course(parse("--seed", "1"), 2, ("own",), facts) != config
    assert course(parse(), 2, ("own",), {"model.width": 9}) != config


class Model(nn.Module):
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.ones(3, 4))
        self.classes = nn.Embedding(2, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.linear = nn.Linear(4, 4)


def test_weight_decay_is_of_linear_matrices_alone():
    """Decay of biases, norms, embeddings or positions, of weights that are frozen, or by another amount."""
    model = Model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(parse(), model, weight_decay=0.5)
    assert isinstance(optimizer, torch.optim.AdamW)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name == "linear.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    assert len(optimizer.param_groups) == 2
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_without_weight_decay_it_is_adam():
    """An optimiser whose state no longer fits checkpoints: one group, in the model's order."""
    model = Model()
    optimizer = build_optimizer(parse("--adam_epsilon", "1e-6"), model)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.Adam
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [id(p) for p in group["params"]] == [id(p) for p in trained]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.9, 0.95), 1e-6, 0)


def test_polynomial_schedule_ends_where_it_is_told():
    """Options of the polynomial schedule that do not reach it."""
    args = parse("--lr_scheduler", "polynomial", "--lr_end", "0.02", "--max_train_steps", "4", "--lr_power", "2")
    optimizer = build_optimizer(args, Model())
    scheduler, rates = build_lr_scheduler(args, optimizer), []
    for _ in range(5):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.02 + 0.08 * (1 - step / 4) ** 2 for step in range(5)])


def test_read_config(tmp_path):
    """A model's fields that are understood in one form only."""
    (tmp_path / "model.json").write_text('{"hidden_size": 8}')
    for given in ('{"hidden_size": 8}', ' {"hidden_size": 8}', str(tmp_path / "model.json"), {"hidden_size": 8}):
        assert read_config(given) == {"hidden_size": 8}
    assert read_config(None) == {}
