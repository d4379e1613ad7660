"""What the tests share: no network, and a model small enough to run in milliseconds."""

import os


os.environ["OMP_NUM_THREADS"] = "1"  # forked processes do not survive a pool of threads
os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is first imported

import pytest  # noqa: E402
import torch  # noqa: E402
from scripts import load_script  # noqa: E402

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler  # noqa: E402


@pytest.fixture
def tiny_config() -> dict:
    """Arguments of a `FlowMoAutoencoder`: 16 x 16 pixels, 8 tokens of 2 groups of 3 bits, 6 bytes an image."""
    return {
        "sample_size": 16,
        "patch_size": 4,
        "num_latent_tokens": 8,
        "latent_channels": 6,
        "codebook_bits": 3,
        "encoder_num_layers": 2,
        "decoder_num_layers": 2,
        "encoder_hidden_size": 32,
        "decoder_hidden_size": 32,
        "num_attention_heads": 2,
        "rope_axes": [4, 6, 6],
    }


@pytest.fixture
def tiny_autoencoder(tiny_config: dict) -> FlowMoAutoencoder:
    """In evaluation mode and the same each time, with noise on every parameter: gates are open and codes matter."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = FlowMoAutoencoder(**tiny_config)
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def tiny_pipeline(tiny_autoencoder: FlowMoAutoencoder) -> FlowMoPipeline:
    """Of `tiny_autoencoder` and the default scheduler, without a progress bar."""
    pipeline = FlowMoPipeline(tiny_autoencoder, FlowMoScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def script():
    """The training script as a module."""
    return load_script("train_flowmo")
