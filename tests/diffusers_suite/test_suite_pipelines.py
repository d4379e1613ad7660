"""Both pipelines under diffusers' tests of pipelines."""

import pytest
import torch
from diffusers_checkout import needs_accelerator, parameters, pipelines, torch_device

from flowmo_diffusers import (
    FlowMoAutoencoder,
    FlowMoGenerationPipeline,
    FlowMoPipeline,
    FlowMoScheduler,
    FlowMoTokenGenerator,
    FlowMoTokenScheduler,
)


OFFLOADING = (
    "test_sequential_cpu_offload_forward_pass",
    "test_model_cpu_offload_forward_pass",
    "test_cpu_offload_forward_pass_twice",
    "test_sequential_offload_forward_pass_twice",
)


class OffloadTests(pipelines.MemoryTesterMixin):
    for name in OFFLOADING:
        locals()[name] = needs_accelerator(getattr(pipelines.MemoryTesterMixin, name))


class FlowMoConfig(pipelines.BasePipelineTesterConfig):
    pipeline_class = FlowMoPipeline
    required_input_params_in_call_signature = parameters.IMAGE_VARIATION_PARAMS
    batch_input_params = parameters.IMAGE_VARIATION_BATCH_PARAMS
    optional_input_params = pipelines.BasePipelineTesterConfig.optional_input_params - {"num_images_per_prompt"}
    output_shape = (3, 16, 16)

    def get_dummy_components(self):
        torch.manual_seed(0)
        autoencoder = FlowMoAutoencoder(
            sample_size=16,
            num_latent_tokens=8,
            latent_channels=6,
            codebook_bits=3,
            encoder_num_layers=1,
            decoder_num_layers=1,
            encoder_hidden_size=32,
            decoder_hidden_size=32,
            num_attention_heads=2,
            rope_axes=(4, 6, 6),
        )
        return {"autoencoder": autoencoder, "scheduler": FlowMoScheduler()}

    def get_dummy_inputs(self):
        image = torch.rand(3, 16, 16, generator=self.get_generator()) * 2 - 1
        return {
            "image": image.to(torch_device),
            "generator": self.get_generator(),
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
            "guidance_interval": (0.0, float("inf")),
            "output_type": "pt",
        }


class TestFlowMoPipeline(FlowMoConfig, pipelines.PipelineTesterMixin):
    pass


class TestFlowMoPipelineMemory(FlowMoConfig, OffloadTests):
    pass


class GenerationConfig(pipelines.BasePipelineTesterConfig):
    pipeline_class = FlowMoGenerationPipeline
    required_input_params_in_call_signature = parameters.CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_input_params = parameters.CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    optional_input_params = FlowMoConfig.optional_input_params - {"latents"}  # `tokens` are what it starts from
    output_shape = (3, 16, 16)

    def get_dummy_components(self):
        tokenizer = FlowMoConfig().get_dummy_components()
        generator = FlowMoTokenGenerator(
            num_tokens=8,
            token_groups=2,
            group_bits=3,
            num_classes=3,
            hidden_size=32,
            num_layers=1,
            num_attention_heads=2,
        )
        return {"generator": generator, "token_scheduler": FlowMoTokenScheduler(), **tokenizer}

    def get_dummy_inputs(self):
        return {
            "class_labels": 1,
            "generator": self.get_generator(),
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "decoder_num_inference_steps": 2,
            "output_type": "pt",
        }


class TestFlowMoGenerationPipeline(GenerationConfig, pipelines.PipelineTesterMixin):
    @pytest.mark.skip(
        "zeros in place of the last latents are tokens here, not an image; see "
        "test_generation_pipeline.py::test_callbacks_see_replace_and_interrupt"
    )
    def test_callback_inputs(self):
        pass


class TestFlowMoGenerationPipelineMemory(GenerationConfig, OffloadTests):
    pass
