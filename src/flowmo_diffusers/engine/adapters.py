"""A LoRA adapter in a training run: the model is frozen, the adapter is trained, and both come out."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.utils import is_peft_available


def add_adapter_options(group: argparse._ArgumentGroup) -> None:
    """Of a script that has --pretrained_model_name_or_path itself."""
    add = group.add_argument
    add("--lora_rank", type=int, help="train a LoRA adapter of this rank; the pretrained weights stay as they are")
    add("--lora_alpha", type=float, help="what the adapter adds is scaled by alpha / rank; default: the rank")
    add("--lora_target_modules", help="regular expression of the whole names of linear layers; default: attention and "
        "MLPs of all blocks, of a tokenizer those of the decoder")  # fmt: skip


def adapter_rules(args: argparse.Namespace) -> tuple[tuple[Any, str], ...]:
    """As [`~flowmo_diffusers.engine.training_options.check_options`] takes them."""
    details = args.lora_alpha is not None or args.lora_target_modules is not None
    rank, alpha = args.lora_rank, args.lora_alpha
    return (
        (rank is not None and rank < 1, f"--lora_rank {rank} must be at least 1"),
        (alpha is not None and not alpha > 0, f"--lora_alpha {alpha} must be positive"),
        (rank is None and details, "--lora_alpha and --lora_target_modules belong to --lora_rank"),
        (rank and args.pretrained_model_name_or_path is None,
         "--lora_rank adapts a trained pipeline: give --pretrained_model_name_or_path"),
        (rank and not is_peft_available(),
         '--lora_rank needs PEFT: pip install "flowmo_diffusers[lora]"'),
    )  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """
    LoRA as a run trains it.

    Args:
        rank: Of each layer's update.
        alpha: The update is scaled by alpha / rank.
        target_modules: Regular expression of the names of layers; `None` is the model's own `lora_target_modules`.
    """

    rank: int
    alpha: float
    target_modules: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Adapter | None":
        """As the options of [`add_adapter_options`] say; `None` without --lora_rank."""
        if args.lora_rank is None:
            return None
        return cls(args.lora_rank, args.lora_alpha or args.lora_rank, args.lora_target_modules)

    def attach(self, model: ModelMixin) -> None:
        """
        Freezes the model but for a new adapter, which does nothing before it is trained.

        Raises:
            ValueError: If the model has no such layers.
        """
        from peft import LoraConfig  # optional

        targets = self.target_modules or model.lora_target_modules
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets))


def save_and_merge_adapter(model: ModelMixin, folder: Path) -> None:
    """
    Writes the adapter to `pytorch_lora_weights.safetensors` in the folder, and leaves a plain model with the adapter
    in its weights. These are others then: the tensors that the model had may be those that are being trained.
    """
    model.save_lora_adapter(folder)
    model.fuse_lora(safe_fusing=True)  # into copies
    model.unload_lora()
