"""LoRA on both models, and its training by both scripts."""

import argparse
import copy
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from processes import forget_accelerators
from scripts import load_script

from flowmo_diffusers import FlowMoPipeline, FlowMoTokenGenerator
from flowmo_diffusers.engine.adapters import Adapter, adapter_rules, save_and_merge_adapter


peft = pytest.importorskip("peft", reason='needs PEFT: pip install "flowmo_diffusers[lora]"')
FILE = "pytorch_lora_weights.safetensors"


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"lora_rank": 2, "lora_alpha": None, "lora_target_modules": None, **changes})


@pytest.fixture
def tiny_generator() -> FlowMoTokenGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlowMoTokenGenerator(
            num_tokens=8, token_groups=2, group_bits=3, num_classes=3, hidden_size=32, num_layers=2,
            num_attention_heads=2,
        ).eval()  # fmt: skip


@pytest.fixture(params=["autoencoder", "generator"])
def model(request, tiny_autoencoder, tiny_generator) -> ModelMixin:
    return tiny_autoencoder if request.param == "autoencoder" else tiny_generator


@torch.no_grad()
def answer(model: ModelMixin) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    if isinstance(model, FlowMoTokenGenerator):
        return model(torch.randint(-1, 8, (2, 8, 2), generator=random), torch.tensor([0, model.null_class]))[0]
    x_t, x = torch.rand(2, 2, 3, 16, 16, generator=random) * 2 - 1
    return model(x_t, 0.5, images=x, return_dict=False)[0]


def disturbed(model: ModelMixin) -> ModelMixin:
    """With an adapter that does something."""
    Adapter(2, 2.0).attach(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return model


# The adapter


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(model):
    """A base that is not frozen, an adapter that begins as noise, or one that reaches the encoder or the head."""
    before, names = answer(model), dict(model.named_modules())
    Adapter(2, 2.0).attach(model)
    assert torch.equal(answer(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    adapted = {name.split(".lora_")[0] for name in trained}
    start = "blocks." if isinstance(model, FlowMoTokenGenerator) else "decoder.blocks."
    linear = {
        name
        for name, module in names.items()
        if name.startswith(start) and isinstance(module, torch.nn.Linear) and "modulation" not in name
    }
    assert adapted == linear and all(re.fullmatch(model.lora_target_modules, name) for name in adapted)


def test_every_part_of_the_adapter_gets_a_gradient(model):
    """A layer whose adapter is passed by, as a context stream's fused projection might be."""
    disturbed(model).train()
    torch.enable_grad()(answer.__wrapped__)(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == ("lora_" in name), name


def test_saved_loaded_and_unloaded(model, tmp_path):
    """An adapter that is another after a round trip, or that leaves something behind."""
    plain, fresh = answer(model), copy.deepcopy(model)
    adapted = answer(disturbed(model))
    assert (adapted - plain).abs().max() > 1e-2
    model.save_lora_adapter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    fresh.load_lora_adapter(tmp_path)
    torch.testing.assert_close(answer(fresh), adapted)
    fresh.disable_lora()
    assert torch.equal(answer(fresh), plain)
    fresh.enable_lora()
    fresh.set_adapters("default_0", 0.0)
    assert torch.equal(answer(fresh), plain)
    fresh.unload_lora()
    assert torch.equal(answer(fresh), plain) and fresh.state_dict().keys() == copy.deepcopy(fresh).state_dict().keys()


def test_two_adapters(model, tmp_path):
    """Adapters that cannot stand side by side, be chosen or be removed."""
    plain, first = answer(model), answer(disturbed(model))
    model.save_lora_adapter(tmp_path)
    model.load_lora_adapter(tmp_path, adapter_name="second")
    model.set_adapters(["default", "second"], [0.5, 0.5])
    torch.testing.assert_close(answer(model), first)
    model.delete_adapters("default")
    model.set_adapters("second")
    torch.testing.assert_close(answer(model), first)
    model.delete_adapters("second")
    assert torch.equal(answer(model), plain)


def test_merged(model, tmp_path):
    """Weights into which an adapter is merged wrongly, that cannot be saved, or whose merging changes the model that
    it was copied from."""
    disturbed(model)
    adapted, weights = answer(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        copied = type(model).from_config(model.config)
        Adapter(2, 2.0).attach(copied)
    copied.load_state_dict(model.state_dict(), assign=True)
    save_and_merge_adapter(copied, tmp_path / "adapter")
    copied.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(type(model).from_pretrained(tmp_path / "merged")), adapted)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    before = answer(model)
    model.fuse_lora()
    torch.testing.assert_close(answer(model), before)
    model.unfuse_lora()
    torch.testing.assert_close(answer(model), before)


def test_ranks_by_module(model, tmp_path):
    """A rank of one layer that is lost on the way through the file."""
    name = next(name for name, _ in model.named_modules() if re.fullmatch(model.lora_target_modules, name))
    config = peft.LoraConfig(target_modules=model.lora_target_modules, r=2, lora_alpha=2, rank_pattern={name: 3},
        init_lora_weights=False)  # fmt: skip
    fresh = copy.deepcopy(model)
    model.add_adapter(config)
    model.save_lora_adapter(tmp_path)
    fresh.load_lora_adapter(tmp_path)
    assert fresh.get_submodule(name).lora_A["default_0"].weight.shape[0] == 3
    torch.testing.assert_close(answer(fresh), answer(model))


def test_norm_rescaling_leaves_the_adapter_alone(tiny_autoencoder):
    """Norms of an adapter held at their first value, zero among them."""
    before = tiny_autoencoder.block_weights()
    Adapter(2, 2.0).attach(tiny_autoencoder)
    assert all(there is here for there, here in zip(before, tiny_autoencoder.block_weights(), strict=True))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_and_checkpointed(tiny_autoencoder, gradient_checkpointing):
    """Graphs that an adapter breaks, or gradients that are others when blocks are computed again."""
    disturbed(tiny_autoencoder).train()
    plain = copy.deepcopy(tiny_autoencoder)
    if gradient_checkpointing:
        tiny_autoencoder.enable_gradient_checkpointing()
    for block in tiny_autoencoder.decoder.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for each in (plain, tiny_autoencoder):
        torch.enable_grad()(answer.__wrapped__)(each).square().mean().backward()
    found = {name: parameter.grad for name, parameter in tiny_autoencoder.named_parameters() if "lora_" in name}
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(found[name.replace("_orig_mod.", "")], parameter.grad)


# What is refused


def test_what_is_refused(model, tmp_path, monkeypatch):
    """Weights under names that no model has, a pickle that is read, or a target that is nowhere."""
    disturbed(model)
    with pytest.raises(ValueError, match=r"adapters \['default'\] are attached.*fuse_lora"):
        model.save_pretrained(tmp_path)
    model.save_lora_adapter(tmp_path, safe_serialization=False)
    model.unload_lora()
    with pytest.raises(ValueError, match="safetensors only"):
        model.load_lora_adapter(tmp_path, use_safetensors=False)
    with pytest.raises(OSError):
        model.load_lora_adapter(tmp_path)
    with pytest.raises(ValueError, match="not found in the base model"):
        Adapter(2, 2.0, "to_q").attach(model)
    path = {"pretrained_model_name_or_path": "there"}
    said = [message for wrong, message in adapter_rules(options(lora_rank=None, lora_alpha=2.0, **path)) if wrong]
    assert said == ["--lora_alpha and --lora_target_modules belong to --lora_rank"]
    said = [message for wrong, message in adapter_rules(options(lora_rank=0, lora_alpha=-1.0, **path)) if wrong]
    assert said == ["--lora_rank 0 must be at least 1", "--lora_alpha -1.0 must be positive"]
    assert not any(wrong for wrong, _ in adapter_rules(options(**path)))
    monkeypatch.setattr("flowmo_diffusers.engine.adapters.is_peft_available", lambda: False)
    said = [message for wrong, message in adapter_rules(options(pretrained_model_name_or_path=None)) if wrong]
    assert len(said) == 2 and "--pretrained_model_name_or_path" in said[0] and "flowmo_diffusers[lora]" in said[1]


# The scripts


@pytest.fixture
def train_tokenizer(script, tiny_pipeline, tmp_path):
    """Runs the script on the embedded images from the tiny tokenizer: `train_tokenizer(output_dir, option=value)`."""
    tiny_pipeline.save_pretrained(tmp_path / "base")

    def run(output_dir, **changes):
        given = {
            "dataset_name": "emoji", "cache_dir": tmp_path / "cache", "perceptual": "lpips-alex", "guard": "psnr",
            "pretrained_model_name_or_path": tmp_path / "base", "train_batch_size": 4, "max_train_steps": 4,
            "num_validation_images": 4, "num_inference_steps": 2, "learning_rate": 1e-2, "mixed_precision": "no",
            "ema_decay": 0.5, "ema_update_every": 1, "lora_rank": 2, "resolution": 32,
        } | changes  # fmt: skip
        forget_accelerators()
        argv = ["--output_dir", str(output_dir)]
        for name, value in given.items():
            argv += [f"--{name}", str(value)] if value is not None else []
        script.main(script.parse_args(argv))
        return FlowMoPipeline.from_pretrained(output_dir).autoencoder

    yield run
    forget_accelerators()


def test_options_of_the_scripts(script, capsys):
    """A script that does not ask whether an adapter's options fit."""
    of_generators = load_script("train_generator")
    for each, data in ((script, "--dataset_name emoji"), (of_generators, "--tokenizer t --train_tokens_dir d")):
        with pytest.raises(SystemExit):
            each.parse_args(["--output_dir", "out", *data.split(), "--lora_rank", "2"])
        assert "--lora_rank adapts a trained pipeline" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain", "posttrain", "distill"])
def test_a_run_leaves_the_adapter_and_the_weights_with_it(train_tokenizer, tiny_autoencoder, tmp_path, stage):
    """A result that is not the base with the adapter, an adapter that was not trained, or an encoder that was."""
    trained = train_tokenizer(tmp_path / "out", stage=stage, validation_steps=2, guard="none")
    assert trained.num_parameters() == tiny_autoencoder.num_parameters()
    tiny_autoencoder.load_lora_adapter(tmp_path / "out")
    assert all(p.any() for name, p in tiny_autoencoder.named_parameters() if "lora_" in name)
    torch.testing.assert_close(answer(trained), answer(tiny_autoencoder))
    tiny_autoencoder.unload_lora()
    before, after = tiny_autoencoder.state_dict(), trained.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if re.fullmatch(trained.lora_target_modules + r"\.weight", name)}
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["steps"] == 4 and f"{trained.num_parameters():,}" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_goes_on_bit_for_bit(train_tokenizer, tmp_path):
    """An adapter that checkpoints lose, or that validation on the way has merged into the weights being trained."""
    often = {"checkpointing_steps": 2, "validation_steps": 1, "guard": "psnr"}
    whole = train_tokenizer(tmp_path / "whole", **often)
    train_tokenizer(tmp_path / "seldom", guard="none")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    shutil.copytree(tmp_path / "whole" / "best", tmp_path / "again" / "best")
    again = train_tokenizer(tmp_path / "again", **often, resume_from_checkpoint="latest")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    last = (tmp_path / name / "validation" / "pretrain-0000004.png" for name in ("whole", "seldom", "again"))
    assert len({path.read_bytes() for path in last}) == 1


WITHOUT_PEFT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else find(name, *rest)
sys.modules["peft"] = None
from flowmo_diffusers import FlowMoPipeline
from flowmo_diffusers.assets import starter
pipe = FlowMoPipeline.from_pretrained(starter())
pipe.save_pretrained(sys.argv[1])
pipe.autoencoder.load_lora_adapter(sys.argv[1])
"""


def test_the_package_works_without_peft(tmp_path):
    """An import of what is optional, or a demand for it that does not say so."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEFT, str(tmp_path)], capture_output=True, text=True)
    assert (tmp_path / "model_index.json").is_file(), done.stderr
    assert "ImportError: LoRA needs PEFT: pip install" in done.stderr
