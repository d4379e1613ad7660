"""Quantizers: exact codes and indices, losses equal to their definitions, at a cost that stays small."""

import math
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowmo_diffusers.models.quantizers import (
    ENTROPY_TEMPERATURE,
    FSQQuantizer,
    KLQuantizer,
    LFQQuantizer,
    NoQuantizer,
    ScalarQuantizer,
    build_quantizer,
    lfq_entropies,
    straight_through,
)


HALF_DTYPES = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def dense_entropies(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both entropies by the definition, in float64: a softmax over all 2^K codes of every vector."""
    vectors = vectors.double()
    bits = vectors.shape[1]
    book = ((torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1).double() * 2 - 1
    logits = 2 * vectors @ book.T / ENTROPY_TEMPERATURE
    log_q, q = logits.log_softmax(dim=1), logits.softmax(dim=1)
    mean = q.mean(dim=0)
    return -(q * log_q).sum(dim=1).mean(), -(mean * (mean + 1e-5).log()).sum()


class Allocations(TorchDispatchMode):
    """
    Records the largest tensor any operation returns, in elements, the sum of all of them, in bytes, and how many
    operations there are that are more than another view of a tensor.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.total = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if torch.is_tensor(tensor)}
        results = [tensor for tensor in tree_leaves(out) if torch.is_tensor(tensor)]
        views = all(tensor.untyped_storage().data_ptr() in storages for tensor in results)
        self.operations += func._schema.is_mutable or not views
        for tensor in results:
            self.largest = max(self.largest, tensor.numel())
            self.total += tensor.numel() * tensor.element_size()
        return out


# LFQ's entropies


@pytest.mark.parametrize("bits", [1, 2, 5, 9])
@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_entropies_equal_dense_form(bits: int, scale: float) -> None:
    """Catches a wrong temperature, eps, factor or half of the bits: odd and even K, soft to hard distributions."""
    vectors = normal(300, bits, scale=scale).requires_grad_()
    reference = vectors.detach().double().requires_grad_()
    for value, expected in zip(lfq_entropies(vectors), dense_entropies(reference), strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
        (gradient,) = torch.autograd.grad(value, vectors, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, reference, retain_graph=True)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-6, atol=2e-7)
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_entropies_of_14_bits_equal_dense_form() -> None:
    """Catches a split of FlowMo-Hi's codebook that loses bits, and sums that cancel: few vectors have a dense form."""
    vectors = normal(64, 14, seed=3, scale=0.1).requires_grad_()
    reference = vectors.detach().double().requires_grad_()
    values, wanted = lfq_entropies(vectors), dense_entropies(reference)
    for value, expected in zip(values, wanted, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=2e-6)
    (gradient,) = torch.autograd.grad(torch.sub(*values), vectors)
    (expected,) = torch.autograd.grad(torch.sub(*wanted), reference)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_entropies_at_known_points() -> None:
    """Catches a wrong base of the logarithm or sign: undecided bits have K log 2, decided ones nothing."""
    per_sample, codebook = lfq_entropies(torch.zeros(8, 9))
    assert per_sample.item() == pytest.approx(9 * math.log(2), rel=1e-6)
    assert codebook.item() == pytest.approx(-math.log(2**-9 + 1e-5), rel=1e-6)
    every_code = ((torch.arange(512)[:, None] >> torch.arange(9)) & 1) * 2.0 - 1
    per_sample, codebook = lfq_entropies(10 * every_code)
    assert per_sample.item() == pytest.approx(0, abs=1e-6)
    assert codebook.item() == pytest.approx(-math.log(2**-9 + 1e-5), rel=1e-6)
    _, codebook = lfq_entropies(torch.full((512, 9), 10.0))
    assert codebook.item() == pytest.approx(0, abs=2e-5)


def test_entropies_of_18_bits_stay_small(capsys: pytest.CaptureFixture) -> None:
    """Catches the dense N x 2^K form: 4 096 vectors of 18 bits would need a tensor of a thousand million numbers."""
    count, bits = 4096, 18
    vectors = normal(count, bits).requires_grad_()
    lfq_entropies(vectors)[0].backward()  # whatever the first call of a process costs
    started = time.process_time()
    with Allocations() as seen:
        per_sample, codebook = lfq_entropies(vectors)
        (per_sample - codebook).backward()
    seconds = time.process_time() - started
    with capsys.disabled():
        print(
            f"\nLFQ entropies, N={count}, K={bits}, forward and backward: {seconds:.2f} s of CPU time, largest tensor "
            f"{seen.largest:,} numbers, all tensors together {seen.total / 2**20:.0f} MiB"
        )
    assert seen.largest == 2 * count * 2 ** (bits // 2)  # the distributions of both half-codes
    assert seen.total < 1e9  # even if nothing were freed
    assert seen.operations <= 42  # each is a kernel to start, which is what they cost on a GPU
    assert seconds < 2


@pytest.mark.parametrize("bits", [1, 9, 14])
def test_extreme_latents_are_finite(bits: int) -> None:
    """Catches inf - inf and 0 * inf in the entropies, where bits are decided beyond float32 or not at all."""
    rows = [normal(bits, seed=seed) * scale for seed, scale in enumerate((1e4, -1e4, 1e-30, 1e10))]
    vectors = torch.stack([*rows, torch.zeros(bits), torch.full((bits,), 1e4), torch.full((bits,), -1e4)])
    vectors.requires_grad_()
    for value in lfq_entropies(vectors):
        assert torch.isfinite(value) and value >= 0
        (gradient,) = torch.autograd.grad(value, vectors, retain_graph=True)
        assert torch.isfinite(gradient).all()


def test_entropies_ignore_autocast() -> None:
    """Catches a half-precision matrix product inside a training step's autocast, whose error exceeds the entropy's."""
    vectors = normal(256, 9, scale=0.2)
    expected = lfq_entropies(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(lfq_entropies(vectors), expected, strict=True))


# LFQ


def test_lfq_losses_by_their_definitions() -> None:
    """Catches groups built from the wrong channels, a sign error in the entropy term, or a sum for a mean."""
    quantizer = LFQQuantizer(channels=6, codebook_bits=3)
    latents = normal(2, 5, 6, scale=0.2)
    losses = quantizer.train()(latents).losses
    groups = torch.cat([latents[..., [0, 2, 4]].flatten(0, 1), latents[..., [1, 3, 5]].flatten(0, 1)])
    per_sample, codebook = (value.item() for value in dense_entropies(groups))
    assert losses.keys() == {"entropy_loss", "commit_loss", "per_sample_entropy", "codebook_entropy"}
    assert losses["per_sample_entropy"].item() == pytest.approx(per_sample, rel=1e-6)
    assert losses["codebook_entropy"].item() == pytest.approx(codebook, rel=1e-6)
    assert losses["entropy_loss"].item() == pytest.approx(per_sample - codebook, rel=1e-5)
    assert losses["commit_loss"].item() == pytest.approx((latents.abs() - 1).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_lfq_is_straight_through(dtype: torch.dtype) -> None:
    """Catches x + (sign - x).detach(), which is off by rounding, and a gradient that is not the identity."""
    latents = torch.cat([normal(2, 4, 6, scale=3).flatten(), torch.tensor([0.0, -0.0, 1e4, -1e4, 1e-7, -1e-7])])
    latents = latents.reshape(1, 9, 6).to(dtype).requires_grad_()
    output = LFQQuantizer(6, 3).train()(latents)
    assert output.codes.dtype == dtype
    assert torch.equal(output.codes, torch.where(latents > 0, 1, -1).to(dtype))
    upstream = normal(1, 9, 6, seed=5).to(dtype)
    (gradient,) = torch.autograd.grad(output.codes, latents, upstream)
    assert torch.equal(gradient, upstream)


def test_straight_through_passes_values_and_gradients() -> None:
    """Catches a gradient reaching the codes, or values that are not exactly theirs."""
    codes, latents = normal(50, seed=1).requires_grad_(), (normal(50, seed=2) * 1e6).requires_grad_()
    output = straight_through(codes, latents)
    assert torch.equal(output, codes)
    output.sum().backward()
    assert codes.grad is None and torch.equal(latents.grad, torch.ones(50))


def test_index_of_a_hand_written_token() -> None:
    """Catches consecutive channels for a group, or a big-endian index, which published indices are not."""
    quantizer = LFQQuantizer(channels=6, codebook_bits=3)
    # Two groups: channels 0, 2, 4 and channels 1, 3, 5, the first of each worth 1, the second 2, the third 4.
    token = torch.tensor([+1.0, -1.0, -1.0, +1.0, -1.0, +1.0])
    assert quantizer.groups == 2
    assert quantizer.codes_to_indices(token[None, None]).tolist() == [[[1, 6]]]
    assert torch.equal(quantizer.indices_to_codes(torch.tensor([[[1, 6]]])), token[None, None])


def test_index_of_a_hand_written_fsq_token() -> None:
    """Catches digits in the wrong base or order where a channel has more than two levels."""
    quantizer = FSQQuantizer(channels=4, codebook_bits=4, levels=4)
    levels = torch.tensor([3, 0, 1, 2])  # groups (3, 1) and (0, 2): 3 + 4 * 1 and 0 + 4 * 2
    codes = quantizer.levels_to_codes(levels)
    torch.testing.assert_close(codes, torch.tensor([1, -1, -1 / 3, 1 / 3]))
    assert quantizer.codes_to_indices(codes[None, None]).tolist() == [[[7, 8]]]


# Round trips


@pytest.mark.parametrize(
    "quantizer",
    [LFQQuantizer(18, 9), LFQQuantizer(10, 1), LFQQuantizer(14, 14), LFQQuantizer(24, 24)]
    + [FSQQuantizer(6, bits, levels) for levels, bits in ((2, 3), (4, 4), (8, 6), (256, 24))],
    ids=lambda q: f"{type(q).__name__}-{q.levels}-{q.groups}",
)
def test_indices_and_levels_round_trip(quantizer: ScalarQuantizer) -> None:
    """Catches a level or digit lost between latents, codes and indices, from the first to the last index."""
    output = quantizer.eval()(normal(3, 7, quantizer.channels, scale=2))
    assert output.indices.shape == (3, 7, quantizer.groups) and output.indices.dtype == torch.int64
    assert output.indices.min() >= 0 and output.indices.max() < quantizer.codebook_size
    assert torch.equal(quantizer.indices_to_codes(output.indices), output.codes)
    assert torch.equal(quantizer.codes_to_indices(output.codes), output.indices)
    levels = quantizer.codes_to_levels(output.codes)
    assert torch.equal(quantizer.levels_to_codes(levels), output.codes)
    ends = torch.tensor([0, quantizer.codebook_size - 1])[:, None].expand(2, quantizer.groups)[None]
    codes = quantizer.indices_to_codes(ends)
    assert torch.equal(codes, torch.tensor([-1.0, 1.0])[None, :, None].expand(1, 2, quantizer.channels))
    assert torch.equal(quantizer.codes_to_indices(codes), ends)


def test_every_index_is_its_own() -> None:
    """Catches two codes with one index: all 64 of a small codebook, in both directions."""
    for quantizer in (LFQQuantizer(6, 6), FSQQuantizer(2, 6, 8)):
        indices = torch.arange(64).reshape(1, 64, 1)
        codes = quantizer.indices_to_codes(indices)
        assert len(codes[0].unique(dim=0)) == 64
        assert torch.equal(quantizer.codes_to_indices(codes), indices)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("levels", [2, 4, 8, 256])
def test_levels_survive_half_precision(levels: int, dtype: torch.dtype) -> None:
    """Catches neighbouring levels that become one when codes are stored in the model's dtype."""
    quantizer = FSQQuantizer(1, levels.bit_length() - 1, levels)
    wanted = torch.arange(levels)
    assert torch.equal(quantizer.codes_to_levels(quantizer.levels_to_codes(wanted).to(dtype)), wanted)


def test_values_outside_of_the_levels_count_as_the_nearest() -> None:
    """Catches latents handed over as codes that give indices outside of the codebook."""
    for quantizer in (LFQQuantizer(6, 3), FSQQuantizer(6, 6, 8)):
        indices = quantizer.codes_to_indices(torch.tensor([-7.0, 7.0]).reshape(1, 2, 1).expand(1, 2, 6))
        assert torch.equal(indices[0, 0], torch.zeros(quantizer.groups, dtype=torch.int64))
        assert torch.equal(indices[0, 1], torch.full((quantizer.groups,), quantizer.codebook_size - 1))


# FSQ


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_fsq_reaches_all_levels_symmetrically(levels: int) -> None:
    """Catches an offset that makes a level unreachable or favours one sign, and codes that leave [-1, 1]."""
    quantizer = FSQQuantizer(1, levels.bit_length() - 1, levels)
    latents = torch.linspace(-4, 4, 2000).reshape(1, -1, 1)  # an even number of points: none at zero, where levels tie
    output, mirrored = quantizer(latents), quantizer(-latents)
    assert output.indices.unique().tolist() == list(range(levels))
    assert torch.equal(output.indices + mirrored.indices, torch.full_like(output.indices, levels - 1))
    torch.testing.assert_close(output.codes, -mirrored.codes, rtol=0, atol=3e-7)
    assert output.codes.min() == -1 and output.codes.max() == 1
    spacing = output.codes.unique().diff()
    torch.testing.assert_close(spacing, torch.full_like(spacing, 2 / (levels - 1)))
    assert (output.codes.flatten().diff() >= 0).all()


def test_fsq_gradient_is_that_of_tanh() -> None:
    """Catches a rounding that stops the gradient, or one that skips the bound."""
    latents = normal(2, 3, 4).requires_grad_()
    FSQQuantizer(4, 6, 8)(latents).codes.sum().backward()
    torch.testing.assert_close(latents.grad, 1 - latents.detach().tanh().square())


# The continuous ones


def test_kl_equals_formula() -> None:
    """Catches halves taken along the tokens, a mean where the published loss sums, and a missing clamp."""
    latents = normal(3, 5, 8, scale=2)
    latents[0, 0, 4:] = torch.tensor([-100.0, 100.0, -30.0, 20.0])  # the log-variance is clamped to [-30, 20]
    output = KLQuantizer().train()(latents, torch.Generator().manual_seed(7))
    mean, logvar = latents[..., :4].double(), latents[..., 4:].double().clamp(-30, 20)
    expected = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2)).mean()
    assert output.losses.keys() == {"kl_loss"} and output.indices is None
    assert output.losses["kl_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    noise = torch.randn(3, 4, 5, 1, generator=torch.Generator().manual_seed(7)).squeeze(-1).transpose(1, 2)
    torch.testing.assert_close(output.codes, (mean + (logvar / 2).exp() * noise).float())


def test_kl_draw_is_the_generators() -> None:
    """Catches a draw from the global state, and a list of generators that does not give each image its own."""
    quantizer, latents = KLQuantizer(), normal(2, 5, 8)

    def draw(latents: torch.Tensor, *seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return quantizer(latents, generators if len(seeds) > 1 else generators[0]).codes

    assert torch.equal(draw(latents, 1), draw(latents, 1))
    assert not torch.equal(draw(latents, 1), draw(latents, 2))
    singles = torch.cat([draw(latents[:1], 3), draw(latents[1:], 4)])
    assert torch.equal(draw(latents, 3, 4), singles)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_kl_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Catches a variance that overflows float16, and a sum over the latent that rounds in the model's dtype."""
    latents = normal(2, 64, 8).to(dtype)
    latents[..., 4] = 12  # a variance of e^12 is beyond float16, its root is not
    output = KLQuantizer().train()(latents, torch.Generator().manual_seed(0))
    expected = KLQuantizer().train()(latents.float(), torch.Generator().manual_seed(0))
    assert output.codes.dtype == dtype and torch.isfinite(output.codes).all()
    assert torch.equal(output.losses["kl_loss"], expected.losses["kl_loss"])
    assert torch.equal(output.codes, expected.codes.to(dtype))


def test_none_is_the_identity() -> None:
    """Catches a continuous model that rounds, copies or invents indices and losses."""
    latents = normal(2, 3, 4)
    output = NoQuantizer().train()(latents)
    assert output.codes is latents and output.indices is None and output.losses == {}


# All of them


@pytest.mark.parametrize("name", ["lfq", "fsq", "kl", "none"])
def test_eval_mode_has_no_losses(name: str) -> None:
    """Catches entropies computed at inference, where nobody reads them, and codes that depend on the mode."""
    quantizer = build_quantizer(name, 6, 3, 8)
    latents = normal(2, 5, 6 * quantizer.latent_multiplier)
    trained = quantizer.train()(latents, torch.Generator().manual_seed(0))
    evaluated = quantizer.eval()(latents, torch.Generator().manual_seed(0))
    assert evaluated.losses == {}
    assert torch.equal(evaluated.codes, trained.codes)
    assert evaluated.codes.shape == (2, 5, 6)


@pytest.mark.parametrize("name", ["lfq", "fsq"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_equals_float32(name: str, dtype: torch.dtype) -> None:
    """Catches losses in half precision, and latents that fall on another level than in float32."""
    quantizer = build_quantizer(name, 6, 3, 8).train()
    latents = normal(4, 64, 6, scale=0.5).to(dtype).requires_grad_()
    output, expected = quantizer(latents), quantizer(latents.detach().float())
    assert output.codes.dtype == dtype
    assert torch.equal(output.codes, expected.codes.to(dtype))
    assert torch.equal(output.indices, expected.indices)
    for loss, value in output.losses.items():
        assert loss and value.dtype == torch.float32 and torch.equal(value, expected.losses[loss])
    sum(output.losses.values(), output.codes.float().sum()).backward()
    assert torch.isfinite(latents.grad).all()


@pytest.mark.parametrize(
    ("arguments", "field", "fitting"),
    [
        (("vq", 18, 9, 8), "quantizer='vq'", "'lfq', 'fsq', 'kl' or 'none'"),
        (("LFQ", 18, 9, 8), "quantizer='LFQ'", "'lfq', 'fsq', 'kl' or 'none'"),
        (("lfq", 18, 5, 8), "codebook_bits=5", "[1, 2, 3, 6, 9, 18]"),
        (("lfq", 18, 36, 8), "codebook_bits=36", "[1, 2, 3, 6, 9, 18]"),
        (("lfq", 56, 28, 8), "codebook_bits=28", "[1, 2, 4, 7, 8, 14]"),
        (("lfq", 18, 0, 8), "codebook_bits=0", "[1, 2, 3, 6, 9, 18]"),
        (("fsq", 6, 4, 8), "codebook_bits=4", "[3, 6, 9, 18]"),
        (("fsq", 6, 3, 6), "fsq_levels=6", "power of two"),
        (("fsq", 6, 3, 1), "fsq_levels=1", "power of two"),
        (("fsq", 6, 3, 0), "fsq_levels=0", "power of two"),
        (("fsq", 6, 9, 512), "fsq_levels=512", "from 2 to 256"),
    ],
)
def test_impossible_quantizers_are_refused(arguments: tuple, field: str, fitting: str) -> None:
    """Catches a quantizer that is built wrongly in silence, and an error that does not say what would fit."""
    with pytest.raises(ValueError) as error:
        build_quantizer(*arguments)
    assert field in str(error.value) and fitting in str(error.value)
