"""Both schedulers under diffusers' tests of schedulers."""

import pytest
import torch
from diffusers_checkout import schedulers

from flowmo_diffusers import FlowMoScheduler, FlowMoTokenScheduler


class CommonTests(schedulers.SchedulerCommonTest):
    def test_compatibles(self):
        pytest.skip("`compatibles` are looked up in diffusers itself, where this class is not")

    def test_trained_betas(self):
        pytest.skip("there are no betas; FlowMatchEulerDiscreteScheduler fails too")


class TestScheduler(CommonTests):
    scheduler_classes = (FlowMoScheduler,)
    forward_default_kwargs = (("num_inference_steps", 10),)

    def get_scheduler_config(self, **changes):
        return {"num_train_timesteps": 1000, "rho": 4.0, **changes}

    def test_solvers(self):
        """Saved and loaded, each setting takes the same step."""
        for changes in ({"solver": "heun"}, {"rho": 1.0}):
            self.check_over_configs(time_step=None, **changes)

    def test_inference_steps(self):
        for steps in (1, 2, 25):
            self.check_over_forward(time_step=None, num_inference_steps=steps)


class TokensOfOneShape(FlowMoTokenScheduler):
    """The tests' model output has the shape of its sample; logits have one axis more."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        logits = model_output[..., None] * torch.arange(8)
        return super().step(logits, timestep, sample, generator, return_dict)


class TestTokenScheduler(CommonTests):
    scheduler_classes = (TokensOfOneShape,)
    forward_default_kwargs = (("num_inference_steps", 10),)
    dummy_sample = torch.full((4, 8, 2), -1)

    def get_scheduler_config(self, **changes):
        return {"mask_schedule": "arccos", "noise_temperature": 4.5, **changes}

    def test_scheduler_public_api(self):
        pytest.skip(
            "tokens are not scaled: no init_noise_sigma or scale_model_input, as in diffusers' AmusedScheduler"
        )

    def test_add_noise_device(self):
        pytest.skip("nothing is added to tokens: `TokenDraws` masks them in training")


del CommonTests
