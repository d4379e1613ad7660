"""What training scripts have in common on their command lines, and what follows from it."""

import argparse
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

# What may change when a run is resumed; everything else decides its course. The batch counts as a whole, however it is
# spread over processes and accumulation.
FREE_OPTIONS = {
    *("config", "output_dir", "resume_from_checkpoint", "logging_dir", "report_to", "logging_steps"),
    *("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile"),
    "activation_memory_budget",
    *("dataloader_num_workers", "validation_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("max_skipped_steps", "early_stopping_patience", "tracker_project_name"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "license"),
}

# Ranges of options by what is said of a value outside, and the options above that have them.
RANGES = {
    "at least 1": lambda value: value >= 1,
    "at least 0": lambda value: value >= 0,
    "at least 0 and less than 1": lambda value: 0 <= value < 1,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "positive": lambda value: value > 0,
}
LIMITS = {
    "at least 1": (
        *("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "ema_update_every"),
        *("num_validation_images", "checkpointing_steps", "logging_steps", "checkpoints_total_limit"),
        "early_stopping_patience",
    ),
    "at least 0": (
        *("lr_warmup_steps", "lr_end", "max_skipped_steps", "validation_steps", "dataloader_num_workers"),
        "seed",
    ),
    "at least 0 and less than 1": ("ema_decay", "adam_beta1", "adam_beta2"),
    "from 0 to 1": ("activation_memory_budget",),
    "positive": ("learning_rate", "adam_epsilon", "max_grad_norm", "lr_power"),
}


def add_optimisation_options(group: argparse._ArgumentGroup) -> None:
    """Of a script that has --train_batch_size and --learning_rate itself, and its own defaults by `set_defaults`."""
    add = group.add_argument
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--max_train_steps", type=int, default=200_000)
    add("--lr_scheduler", choices=SCHEDULES, default="constant", help="'polynomial' falls to --lr_end")
    add("--lr_warmup_steps", type=int, default=0)
    add("--lr_end", type=float, default=0.0, help="last learning rate of the polynomial schedule")
    add("--lr_power", type=float, default=1.0, help="power of the polynomial schedule; 1 is linear")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.95, help="higher values are unstable for a tokenizer (paper section 4)")
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, help="clip gradients to this norm; default: no clipping")
    add("--max_skipped_steps", type=int, default=10, help="steps in a row whose loss or gradient may not be finite")
    add("--ema_decay", type=float, default=0.9999)
    add("--ema_update_every", type=int, default=10)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: Accelerate's configuration")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False)
    add("--compile", action="store_true", help="compile the repeated blocks by torch.compile")
    add(
        "--activation_memory_budget",
        type=float,
        default=1.0,
        help="with --compile: the share of what blocks keep for the backward pass; the rest is computed again there",
    )
    add("--seed", type=int, default=0)
    add("--dataloader_num_workers", type=int, default=0)


def add_validation_options(group: argparse._ArgumentGroup) -> None:
    """Of a script that has --guard itself, "none" where the last weights are kept."""
    add = group.add_argument
    add("--validation_steps", type=int, default=1000, help="0 validates only at the end")
    add("--num_validation_images", type=int, default=64)
    add("--early_stopping_patience", type=int, help="validations without a better one after which to stop")


def add_run_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--checkpointing_steps", type=int, default=5000)
    add("--checkpoints_total_limit", type=int, default=2)
    add("--resume_from_checkpoint", help="'latest' or a checkpoint's path")
    add("--report_to", default="tensorboard", help="tensorboard, wandb, all or none")
    add("--tracker_project_name", default="flowmo")
    add("--logging_dir", default="logs", help="inside the output folder")
    add("--logging_steps", type=int, default=10)


def add_publishing_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--license", help="of the weights, as the Hub names it; stands in the model card")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id", help="default: the name of the output folder")
    add("--hub_token")
    add("--hub_private_repo", action="store_true", default=None)


def check_options(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    limits: Mapping[str, Collection[str]],
    rules: Iterable[tuple[Any, str]],
) -> None:
    """
    Everything that can be known to be wrong before data or model are loaded, of the options above and of a script's.

    Args:
        limits: Further options by one of RANGES; `None` is in every range.
        rules: Pairs of what must not be true and what is said if it is.

    Raises:
        SystemExit: With the option's name and what is wrong, as argparse does.
    """
    for wanted, fits in RANGES.items():
        for name in (*LIMITS[wanted], *limits.get(wanted, ())):
            value = getattr(args, name)
            if value is not None and not fits(value):
                parser.error(f"--{name} {value} must be {wanted}")
    for wrong, message in (*rules, *_common_rules(args)):
        if wrong:
            parser.error(message)


def _common_rules(args: argparse.Namespace) -> tuple[tuple[Any, str], ...]:
    return (
        (args.lr_scheduler != "polynomial" and (args.lr_end or args.lr_power != 1.0),
         "--lr_end and --lr_power belong to --lr_scheduler polynomial"),
        (args.lr_end > args.learning_rate, f"--lr_end {args.lr_end} is above --learning_rate {args.learning_rate}"),
        (args.lr_scheduler == "constant" and args.lr_warmup_steps,
         "--lr_warmup_steps belongs to a schedule with a warmup: --lr_scheduler constant_with_warmup"),
        (args.lr_warmup_steps > args.max_train_steps,
         f"--lr_warmup_steps {args.lr_warmup_steps} is more than --max_train_steps {args.max_train_steps}"),
        (args.early_stopping_patience and (args.guard == "none" or not args.validation_steps),
         "--early_stopping_patience needs a --guard and --validation_steps"),
        (args.activation_memory_budget != 1 and not args.compile, "--activation_memory_budget belongs to --compile"),
        (args.report_to not in ("none", "all", *map(str, get_available_trackers())),
         f"--report_to {args.report_to} is no tracker that is installed: {get_available_trackers()}"),
        (args.mixed_precision == "fp16" and not torch.cuda.is_available(),
         "--mixed_precision fp16 needs a GPU; bf16 runs on a CPU too"),
    )  # fmt: skip


def read_config(value: str | dict | None) -> dict:
    """A model's fields as --model_config gives them: JSON text, the path of a JSON file, or a preset's mapping."""
    if isinstance(value, str):
        return json.loads(value if value.lstrip().startswith("{") else Path(value).read_text())
    return value or {}


def joint_batch_size(args: argparse.Namespace, num_processes: int) -> int:
    """Images of one step, of all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * num_processes


def course(args: argparse.Namespace, num_processes: int, free: Collection[str], facts: Mapping[str, Any]) -> dict:
    """
    What decides the course of a run: a checkpoint of another one is refused.

    Args:
        free: The script's own options that do not.
        facts: What does beside the options, by name.
    """
    options = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS | set(free)}
    if args.lr_scheduler.startswith("constant"):
        del options["max_train_steps"]  # such a run may be made longer
    options |= {"joint_batch_size": joint_batch_size(args, num_processes)} | dict(facts)
    return json.loads(json.dumps(options, default=str))


def build_optimizer(
    args: argparse.Namespace, model: torch.nn.Module, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Adam, or AdamW that decays the matrices of linear layers: no biases, norms, embeddings or positions."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "fused": model.device.type in ("cpu", "cuda"),
    }
    if weight_decay == 0:
        return torch.optim.Adam(trained, **options)
    matrices = {module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)}
    groups = [
        {"params": [parameter for parameter in trained if parameter in matrices], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **options)


def build_lr_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    if args.lr_scheduler == "polynomial":
        return get_polynomial_decay_schedule_with_warmup(optimizer, **steps, lr_end=args.lr_end, power=args.lr_power)
    return get_scheduler(args.lr_scheduler, optimizer, **steps)
