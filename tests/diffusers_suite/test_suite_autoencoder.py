"""FlowMoAutoencoder under diffusers' tests of models and of autoencoders."""

import pytest
import torch
from diffusers_checkout import autoencoders, models, torch_device
from suite_models import AttentionTests, CompileTests, LoraTests, MemoryTests, SavingTests

from flowmo_diffusers import FlowMoAutoencoder


class AutoencoderConfig(models.BaseModelTesterConfig):
    """Encoder and decoder in one forward, as in training."""

    model_class = FlowMoAutoencoder
    main_input_name = "sample"
    output_shape = (3, 16, 16)
    model_split_percents = [0.5, 0.9]

    def get_init_dict(self):
        return {
            "sample_size": 16,
            "num_latent_tokens": 8,
            "latent_channels": 6,
            "codebook_bits": 3,
            "encoder_num_layers": 2,
            "decoder_num_layers": 2,
            "encoder_hidden_size": 32,
            "decoder_hidden_size": 32,
            "num_attention_heads": 2,
            "rope_axes": (4, 6, 6),
        }

    def get_dummy_inputs(self, height=16, width=16):
        generator = torch.Generator().manual_seed(0)
        sample, images = torch.randn(2, 2, 3, height, width, generator=generator).to(torch_device, self.torch_dtype)
        return {
            "sample": sample,
            "timestep": torch.tensor([0.3, 0.8], device=torch_device),
            "images": images.clamp(-1, 1),
        }


class TestAutoencoder(AutoencoderConfig, SavingTests):
    pass


class TestAutoencoderSlicing(AutoencoderConfig, autoencoders.AutoencoderTesterMixin):
    pass


class TestAutoencoderAttention(AutoencoderConfig, AttentionTests):
    pass


class TestAutoencoderBackends(AutoencoderConfig, models.AttentionBackendTesterMixin):
    pass


class TestAutoencoderTraining(AutoencoderConfig, models.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"FlowMoTrunk"})


@pytest.mark.slow
class TestAutoencoderCompiled(AutoencoderConfig, CompileTests):
    different_shapes_for_compilation = [(16, 16), (16, 24), (24, 24)]


class TestAutoencoderMemory(AutoencoderConfig, MemoryTests):
    pass


class TestAutoencoderLora(AutoencoderConfig, LoraTests):
    pass
