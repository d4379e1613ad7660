"""FlowMoTokenGenerator under diffusers' tests of models."""

import pytest
import torch
from diffusers_checkout import models, torch_device
from suite_models import AttentionTests, CompileTests, LoraTests, MemoryTests, SavingTests

from flowmo_diffusers import FlowMoTokenGenerator


class GeneratorConfig(models.BaseModelTesterConfig):
    model_class = FlowMoTokenGenerator
    main_input_name = "indices"
    output_shape = (8, 2, 8)
    model_split_percents = [0.5, 0.9]

    def get_init_dict(self):
        return {
            "num_tokens": 8,
            "token_groups": 2,
            "group_bits": 3,
            "num_classes": 3,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
        }

    def get_dummy_inputs(self):
        generator = torch.Generator().manual_seed(0)
        indices = torch.randint(-1, 8, (2, 8, 2), generator=generator)
        return {"indices": indices.to(torch_device), "class_labels": torch.tensor([1, 3], device=torch_device)}


class TestGenerator(GeneratorConfig, SavingTests):
    pass


class TestGeneratorAttention(GeneratorConfig, AttentionTests):
    pass


class TestGeneratorBackends(GeneratorConfig, models.AttentionBackendTesterMixin):
    pass


class TestGeneratorTraining(GeneratorConfig, models.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"FlowMoTokenGenerator"})


@pytest.mark.slow
class TestGeneratorCompiled(GeneratorConfig, CompileTests):
    pass


class TestGeneratorMemory(GeneratorConfig, MemoryTests):
    pass


class TestGeneratorLora(GeneratorConfig, LoraTests):
    pass
