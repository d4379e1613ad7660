"""What the tests of both models share."""

import pytest
from diffusers_checkout import lora, models, needs_accelerator, no_pickles


class SavingTests(models.ModelTesterMixin):
    def test_from_save_pretrained_variant(self, tmp_path):
        """As diffusers' test, whose message for a missing variant names a pickle, which is not looked for here."""
        model = self.model_class(**self.get_init_dict())
        model.save_pretrained(tmp_path, variant="fp16")
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
            self.model_class.from_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path, variant="fp16")
        assert all(weight.equal(loaded.state_dict()[name]) for name, weight in model.state_dict().items())


class MemoryTests(models.MemoryTesterMixin):
    test_cpu_offload = needs_accelerator(models.MemoryTesterMixin.test_cpu_offload)
    test_disk_offload_without_safetensors = no_pickles(models.MemoryTesterMixin.test_disk_offload_without_safetensors)
    test_disk_offload_with_safetensors = needs_accelerator(models.MemoryTesterMixin.test_disk_offload_with_safetensors)
    test_group_offloading = needs_accelerator(models.MemoryTesterMixin.test_group_offloading)
    test_group_offloading_with_layerwise_casting = needs_accelerator(
        models.MemoryTesterMixin.test_group_offloading_with_layerwise_casting
    )
    test_group_offloading_with_disk = needs_accelerator(models.MemoryTesterMixin.test_group_offloading_with_disk)


class CompileTests(models.TorchCompileTesterMixin):
    test_compile_with_group_offloading = needs_accelerator(
        models.TorchCompileTesterMixin.test_compile_with_group_offloading
    )


class LoraTests(lora.LoraTesterMixin):
    @pytest.fixture(autouse=True)
    def own_names(self, monkeypatch):
        """diffusers' tests adapt `to_q`, `to_k`, `to_v` and `to_out.0`, which here are `to_qkv` and `to_out`."""
        plain = lora.LoraConfig
        monkeypatch.setattr(
            lora, "LoraConfig", lambda **options: plain(**{**options, "target_modules": ["to_qkv", "to_out"]})
        )
