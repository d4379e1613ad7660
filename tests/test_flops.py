"""FLOPs counted from a configuration are those a forward pass does, and training counts as it should."""

import pytest
import torch
from token_models import build_generator, random_indices
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler, FlowMoTokenGenerator
from flowmo_diffusers.models.flops import decoder_flops, encoder_flops, generator_flops
from flowmo_diffusers.objectives.cost import distillation_flops, posttraining_flops, pretraining_flops
from flowmo_diffusers.objectives.distill import DistillationWeights, distillation_loss
from flowmo_diffusers.objectives.flow import FlowDraws
from flowmo_diffusers.objectives.posttrain import ChainDraws, posttraining_loss
from flowmo_diffusers.objectives.pretrain import LossWeights, pretraining_loss


# Odd in every number, and the shallowest: the only block is the last, whose context stream is cut short.
ODD = {
    "sample_size": 21,
    "in_channels": 1,
    "patch_size": 7,
    "num_latent_tokens": 5,
    "latent_channels": 9,
    "codebook_bits": 3,
    "quantizer": "kl",
    "encoder_num_layers": 1,
    "decoder_num_layers": 1,
    "encoder_hidden_size": 36,
    "decoder_hidden_size": 54,
    "num_attention_heads": 3,
    "mlp_ratio": 2.7,
    "rope_axes": [2, 2, 2],
}


def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return 2 * sdpa_flop_count(query, key, value)  # the scores that it computes again are no work of the model's


FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def counted(function) -> int:
    """FLOPs of matrix products as PyTorch counts them, and of attention's CPU kernel, which it does not know."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture(params=["tiny", "deeper", "fsq", "odd"])
def model(request, tiny_config) -> FlowMoAutoencoder:
    changes = {
        "tiny": {},
        "deeper": {"encoder_num_layers": 3, "decoder_num_layers": 4, "decoder_hidden_size": 64},
        "fsq": {"quantizer": "fsq", "fsq_levels": 8, "codebook_bits": 9},
        "odd": ODD,
    }
    return FlowMoAutoencoder(**{**tiny_config, **changes[request.param]}).eval()


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_forward_flops_equal_those_counted(model, grid):
    """Catches a layer left out or counted double, dead branches counted, or attention of the wrong lengths."""
    config = model.config
    height, width = (side * config.patch_size for side in grid)
    images = torch.zeros(1, config.in_channels, height, width)
    codes = torch.zeros(1, config.num_latent_tokens, config.latent_channels)
    assert encoder_flops(config, height, width) == counted(lambda: model.encode(images))
    assert decoder_flops(config, height, width) == counted(lambda: model(images, 0.5, codes=codes))


def draws(model: FlowMoAutoencoder, batch: int, chain_steps: int) -> tuple[torch.Tensor, FlowDraws, ChainDraws]:
    side = model.config.sample_size
    x = torch.zeros(batch, model.config.in_channels, side, side)
    flow = FlowDraws(z=torch.ones_like(x), t=torch.full((batch,), 0.5), code_mask=torch.ones(batch))
    times = torch.linspace(1, 0, chain_steps + 1).expand(batch, -1)
    return x, flow, ChainDraws(z=torch.ones_like(x), times=times)


def mse(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().mean((1, 2, 3))


@pytest.mark.parametrize("encoder_trained", [True, False])
def test_pretraining_flops_are_those_of_a_step(tiny_config, encoder_trained):
    """Catches a frozen encoder counted as trained, or a backward that is not twice the forward."""
    model = FlowMoAutoencoder(**tiny_config).train()
    model.encoder.requires_grad_(encoder_trained)
    x, flow, _ = draws(model, 3, 1)
    measured = counted(lambda: pretraining_loss(model, x, flow)["loss"].backward())
    # A little less is done than counted: what enters the model needs no gradient.
    assert 0.98 < measured / (3 * pretraining_flops(model.config, 16, 16, encoder_trained)) < 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_posttraining_flops_are_those_of_a_step(tiny_config, checkpointing):
    """Catches a chain counted once, an encoder counted as trained, or recomputation left out of the device's work."""
    model = FlowMoAutoencoder(**tiny_config).train()
    model.encoder.requires_grad_(False)
    if checkpointing:
        model.enable_gradient_checkpointing()
    x, flow, chain = draws(model, 2, 3)
    measured = counted(lambda: posttraining_loss(model, x, flow, chain, mse, LossWeights())["loss"].backward())
    expected = 2 * posttraining_flops(model.config, 16, 16, chain_steps=3, recomputed=checkpointing)
    assert 0.96 < measured / expected < 1


def test_distillation_flops_are_those_of_a_step(tiny_config):
    """Catches a teacher that is counted as trained, or a student whose steps are not."""
    model = FlowMoAutoencoder(**tiny_config).train()
    model.encoder.requires_grad_(False)
    x, flow, chain = draws(model, 2, 3)
    teacher = FlowMoPipeline(FlowMoAutoencoder(**tiny_config), FlowMoScheduler(num_inference_steps=7))
    teacher.set_progress_bar_config(disable=True)

    def step():
        with torch.no_grad():
            codes = model(images=x).codes
        target = teacher.decode(codes, 16, 16, latents=chain.z, output_type="latent")
        distillation_loss(model, x, codes, target, flow, chain, mse, DistillationWeights())["loss"].backward()

    expected = 2 * distillation_flops(model.config, 16, 16, 3, teacher.num_forwards())
    assert 0.96 < counted(step) / expected < 1


def test_published_model_costs_what_is_known_of_it():
    """Catches a slip that small models hide: FlowMo-Lo's forwards, in TFLOP by an independent count."""
    with torch.device("meta"):
        config = FlowMoAutoencoder().config
    encoder, decoder = encoder_flops(config, 256, 256) / 1e12, decoder_flops(config, 256, 256) / 1e12
    # The last blocks' unread streams after attention, which the published code computes and this one does not.
    patches, tokens, both = 4096, 256, 4352
    dead_patches = patches * (20 * 768**2 + 4 * both * 768) / 1e12
    dead_tokens = tokens * (20 * 1152**2 + 4 * both * 1152) / 1e12
    assert encoder == pytest.approx(0.8555, abs=1e-4) and encoder + dead_patches == pytest.approx(0.96, abs=0.005)
    assert decoder == pytest.approx(3.6037, abs=1e-4) and decoder + dead_tokens == pytest.approx(3.61, abs=0.01)
    assert pretraining_flops(config, 256, 256) / 1e12 == pytest.approx(3 * (encoder + decoder))
    assert pretraining_flops(config, 256, 256, encoder_trained=False) / 1e12 == pytest.approx(encoder + 3 * decoder)
    assert posttraining_flops(config, 256, 256) / 1e12 == pytest.approx(encoder + 27 * decoder)
    attention = 4 * both * 1152 * (15 * both + patches) / 1e12
    repeated = posttraining_flops(config, 256, 256, recomputed=True) / 1e12 - (encoder + 27 * decoder)
    assert repeated == pytest.approx(9 * (decoder - attention)) and attention == pytest.approx(1.39, abs=0.01)


@pytest.mark.parametrize("order", ["masked", "autoregressive"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_tokens": 5, "token_groups": 3, "group_bits": 2, "hidden_size": 54, "mlp_ratio": 2.7}]
)
def test_generator_flops_equal_those_counted(order, changes):
    """Catches a head counted once for all groups, or an order whose head is another."""
    model = build_generator(order=order, num_attention_heads=3, **{"hidden_size": 48, "num_layers": 1, **changes})
    indices, labels = random_indices(model, 1), torch.zeros(1, dtype=torch.long)
    assert generator_flops(model.config) == counted(lambda: model(indices, labels))


def test_maskbits_size_costs_what_its_parameters_say():
    """Catches a slip that small models hide: two FLOPs for each weight and token, and attention."""
    with torch.device("meta"):
        config = FlowMoTokenGenerator().config
    blocks = 24 * (12 * 1024**2 * 256 + 2 * 256**2 * 1024)
    ends = 256 * 1024 * (18 + 2 * 512) + 1024**2 * (6 + 2)
    assert generator_flops(config) == 2 * (blocks + ends)
