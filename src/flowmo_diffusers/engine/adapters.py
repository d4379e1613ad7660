"""A LoRA adapter in a training run: the model is frozen, the adapter is trained, and both come out."""

import argparse
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
    """Pairs of what must not be true and what is said if it is."""
    details = args.lora_alpha is not None or args.lora_target_modules is not None
    return (
        (args.lora_rank is None and details, "--lora_alpha and --lora_target_modules belong to --lora_rank"),
        (args.lora_rank and args.pretrained_model_name_or_path is None,
         "--lora_rank adapts a trained pipeline: give --pretrained_model_name_or_path"),
        (args.lora_rank and not is_peft_available(),
         '--lora_rank needs PEFT: pip install "flowmo_diffusers[lora]"'),
    )  # fmt: skip


def attach_adapter(model: ModelMixin, args: argparse.Namespace) -> None:
    """
    Freezes the model but for a new adapter, which does nothing before it is trained.

    Raises:
        ValueError: If the model has no such modules.
    """
    from peft import LoraConfig  # optional

    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha or args.lora_rank,
            target_modules=args.lora_target_modules or model.lora_target_modules,
        )
    )


def save_and_merge_adapter(model: ModelMixin, folder: Path) -> None:
    """
    Writes the adapter to `pytorch_lora_weights.safetensors` in the folder, and leaves a plain model with the adapter
    in its weights. These are others then: the tensors that the model had may be those that are being trained.
    """
    model.save_lora_adapter(folder)
    model.fuse_lora(safe_fusing=True)  # into copies
    model.unload_lora()
