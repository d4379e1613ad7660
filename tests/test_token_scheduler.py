"""FlowMoTokenScheduler: how many groups become known at a step, which, with what values, and how guided."""

import math

import pytest
import torch

from flowmo_diffusers import FlowMoTokenScheduler
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.schedulers.scheduling_flowmo_tokens import (
    GUIDANCE_SCHEDULES,
    MASK_SCHEDULES,
    FlowMoTokenSchedulerOutput,
    mask_ratio,
)


SHAPE = (8, 2)  # tokens and groups
every_mask_schedule = pytest.mark.parametrize("schedule", MASK_SCHEDULES)


def random_logits(batch: int = 2, values: int = 8, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(batch, *SHAPE, values, generator=torch.Generator().manual_seed(seed))


def all_masked(batch: int = 2) -> torch.Tensor:
    return torch.full((batch, *SHAPE), -1)


def run(scheduler: FlowMoTokenScheduler, steps: int, sample: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """The tokens before the first step and after each, with logits that are others at each step."""
    scheduler.set_timesteps(steps)
    generators = [keyed_generator(seed, "tokens", number) for number in range(len(sample))]
    history = [sample]
    for i, timestep in enumerate(scheduler.timesteps):
        history.append(
            scheduler.step(random_logits(len(sample), seed=i), timestep, history[-1], generators).prev_sample
        )
    return history


# How many


def test_mask_ratios_by_hand():
    """Catches schedules that are exchanged, run backwards or in degrees."""
    r = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert mask_ratio(r, "linear").tolist() == [1.0, 0.5, 0.0]
    assert mask_ratio(r, "cosine").tolist() == pytest.approx([1.0, math.sqrt(0.5), 0.0])
    assert mask_ratio(r, "arccos").tolist() == pytest.approx([1.0, 2 / 3, 0.0])
    with pytest.raises(ValueError, match="mask_schedule='square' is unknown.*arccos.*cosine.*linear"):
        mask_ratio(r, "square")


@every_mask_schedule
def test_mask_ratios_fall_from_one_to_zero(schedule):
    """Catches a ratio below 0 or above 1 by rounding, or one that rises again."""
    ratios = mask_ratio(torch.linspace(0, 1, 1001), schedule)
    assert ratios[0] == pytest.approx(1, abs=1e-6) and ratios[-1] == pytest.approx(0, abs=1e-6)
    assert (ratios >= 0).all() and (ratios <= 1).all() and (ratios.diff() < 0).all()


@pytest.mark.parametrize(
    ("schedule", "steps", "left"),
    [
        ("linear", 4, [16, 12, 8, 4, 0]),
        ("linear", 3, [16, 10, 5, 0]),
        ("linear", 10, [16, 14, 12, 11, 9, 8, 6, 4, 3, 1, 0]),
        ("cosine", 4, [16, 14, 11, 6, 0]),  # 16 x 0.924, 0.707, 0.383
        ("arccos", 4, [16, 13, 10, 7, 0]),  # 16 x 0.839, 0.667, 0.460
        ("arccos", 1, [16, 0]),
    ],
)
def test_groups_left_by_hand(schedule, steps, left):
    """Catches rounding up, a ratio of what is left instead of what there was, or a schedule that is one step late."""
    history = run(FlowMoTokenScheduler(mask_schedule=schedule), steps, all_masked())
    assert [(sample < 0).flatten(1).sum(1).tolist() for sample in history] == [[n, n] for n in left]


@every_mask_schedule
@pytest.mark.parametrize("steps", [1, 2, 7, 16, 40])
def test_any_number_of_steps_ends_with_nothing_masked(schedule, steps):
    """Catches groups that stay masked, or one that is known and changes, with more steps than groups as well."""
    history = run(FlowMoTokenScheduler(mask_schedule=schedule), steps, all_masked(3))
    assert len(history) == steps + 1 and (history[-1] >= 0).all() and (history[-1] < 8).all()
    for before, after in zip(history, history[1:], strict=False):
        known = before >= 0
        assert torch.equal(before[known], after[known])


def test_each_image_counts_its_own_groups():
    """Catches a number of groups that is taken from the batch: images with more given would be done too early."""
    sample = torch.full((4, *SHAPE), -1)
    sample[1, :4], sample[2, 0, 0], sample[3] = 5, 6, 7
    history = run(FlowMoTokenScheduler(mask_schedule="linear"), 4, sample)
    left = [(sample < 0).flatten(1).sum(1).tolist() for sample in history]
    assert left == [[16, 8, 15, 0], [12, 6, 11, 0], [8, 4, 7, 0], [4, 2, 3, 0], [0, 0, 0, 0]]
    assert (history[-1][1, :4] == 5).all() and history[-1][2, 0, 0] == 6 and (history[-1][3] == 7).all()


# Which


def test_without_noise_the_most_confident_are_revealed():
    """Catches the least confident revealed, or a confidence that is not that of the value that was drawn."""
    scheduler = FlowMoTokenScheduler(mask_schedule="linear", temperature=0.0, noise_temperature=0.0)
    logits = random_logits()
    log_p, best = logits.log_softmax(-1).max(-1)
    scheduler.set_timesteps(4)
    sample = all_masked()
    for left in (12, 8, 4, 0):
        sample = scheduler.step(logits, scheduler.timesteps[0], sample).prev_sample
        for image, p, values in zip(sample.flatten(1), log_p.flatten(1), best.flatten(1), strict=True):
            revealed = torch.zeros(16, dtype=torch.bool)
            revealed[p.argsort(descending=True)[: 16 - left]] = True
            assert torch.equal(image, torch.where(revealed, values, -1))


def revealed_first(noise_temperature: float, noise_decay: str, steps: int = 2, count: int = 4000) -> float:
    """How often the first step, which reveals one of two groups, reveals the one of twice the probability."""
    scheduler = FlowMoTokenScheduler("linear", 0.0, noise_temperature, noise_decay)
    scheduler.set_timesteps(steps)
    p = torch.tensor([[[0.96, 0.02, 0.02]], [[0.48, 0.26, 0.26]]])
    sample = torch.full((count, 2, 1), -1)
    generator = torch.Generator().manual_seed(0)
    after = scheduler.step(p.log().expand(count, -1, -1, -1), steps - 1, sample, generator).prev_sample
    assert ((after < 0).flatten(1).sum(1) == 1).all()
    return (after[:, 0] == 0).float().mean().item()


@pytest.mark.parametrize(
    ("noise_temperature", "noise_decay", "steps", "weight"),
    [(1.0, "constant", 2, 1.0), (4.5, "constant", 2, 4.5), (4.0, "linear", 2, 2.0), (4.0, "linear", 4, 3.0)],
)
def test_gumbel_noise_draws_the_order(noise_temperature, noise_decay, steps, weight):
    """Catches noise of another shape or decay: with Gumbel noise of weight w, odds are p^(1/w) to q^(1/w)."""
    odds = 2 ** (1 / weight)
    assert revealed_first(noise_temperature, noise_decay, steps) == pytest.approx(odds / (1 + odds), abs=0.025)
    assert revealed_first(0.0, noise_decay, steps, count=100) == 1.0


def test_batch_with_generators_equals_singles():
    """Catches draws that depend on the neighbours, or on how many groups of them are known."""
    scheduler = FlowMoTokenScheduler()
    sample = all_masked(3)
    sample[1, :6] = 3
    together = run(scheduler, 5, sample)[-1]
    for number in range(3):
        scheduler.set_timesteps(5)
        one, generator = sample[number : number + 1], [keyed_generator(0, "tokens", number)]
        for i, timestep in enumerate(scheduler.timesteps):
            logits = random_logits(3, seed=i)[number : number + 1]
            one = scheduler.step(logits, timestep, one, generator).prev_sample
        assert torch.equal(one[0], together[number])
    assert not torch.equal(run(scheduler, 5, sample, seed=1)[-1], together)


# Values


def test_temperature_zero_is_the_likeliest():
    """Catches a division by zero, or a draw where there is nothing to be drawn."""
    scheduler, logits = FlowMoTokenScheduler(temperature=0.0), random_logits()
    values, log_p = scheduler.sample(logits)
    assert torch.equal(values, logits.argmax(-1)) and values.dtype == torch.int64
    torch.testing.assert_close(log_p, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax(temperature):
    """Catches a temperature that multiplies, or a draw whose first or last value is favoured."""
    logits, count = torch.tensor([0.5, -torch.inf, 2.0, -1.0, 0.0, -torch.inf]), 20000
    scheduler = FlowMoTokenScheduler(temperature=temperature)
    values, log_p = scheduler.sample(logits.expand(count, -1), torch.Generator().manual_seed(0))
    p = (logits / temperature).softmax(-1)
    torch.testing.assert_close(log_p, p.log()[values])
    counts = values.bincount(minlength=6)
    assert counts[1] == counts[5] == 0
    some = p > 0
    chi_square = ((counts - count * p)[some].square() / (count * p)[some]).sum()
    assert chi_square < 16.3  # 0.1 % of draws of 4 values are further off


def test_extreme_draws_stay_possible(monkeypatch):
    """Catches 0 or the largest number below 1 drawn into a value of probability 0, or outside of the values."""
    logits = torch.tensor([[-torch.inf, 1.0, -0.3, 0.7, -torch.inf], [-torch.inf, 3.0, -torch.inf, 0.1, -torch.inf]])
    for uniform, expected in ((0.0, [1, 1]), (1 - 2**-24, [3, 3])):
        monkeypatch.setattr(
            "flowmo_diffusers.schedulers.scheduling_flowmo_tokens.draw_uniform",
            lambda shape, *_, uniform=uniform: torch.full(shape, uniform),
        )
        assert FlowMoTokenScheduler().sample(logits)[0].tolist() == expected
        scheduler = FlowMoTokenScheduler()
        scheduler.set_timesteps(2)
        after = scheduler.step(random_logits(), 0, all_masked()).prev_sample
        assert ((after < 0).flatten(1).sum(1) == 10).all()  # 16 x 2/3: noise of such numbers is finite


def test_half_precision_logits_are_drawn_in_float32():
    """Catches sums of 2^9 probabilities in bfloat16, which end at anything but 1."""
    logits = torch.zeros(4000, 512, dtype=torch.bfloat16)
    values, log_p = FlowMoTokenScheduler().sample(logits, torch.Generator().manual_seed(0))
    assert log_p.dtype == torch.float32 and log_p[0].item() == pytest.approx(-math.log(512))
    assert values.float().mean().item() == pytest.approx(255.5, abs=8) and values.max() > 500


# Guidance


def test_guidance_weights_by_hand():
    """Catches schedules that are exchanged, that start at 0, or that do not end at the scale."""
    power = {"guidance_schedule": "cosine-power", "guidance_power": 2.0}
    for options, expected in (
        ({"guidance_schedule": "constant"}, [5.0, 5.0, 5.0, 5.0]),
        ({"guidance_schedule": "linear"}, [2.0, 3.0, 4.0, 5.0]),
        (power, [1 + 2 * (1 - math.cos(math.pi * r**2)) for r in (0.25, 0.5, 0.75, 1.0)]),
        (power | {"guidance_power": 1.0}, [1 + 2 * (1 - math.sqrt(0.5)), 3.0, 1 + 2 * (1 + math.sqrt(0.5)), 5.0]),
    ):
        scheduler = FlowMoTokenScheduler(**options)
        scheduler.set_timesteps(4)
        assert scheduler.guidance_weights(5.0) == pytest.approx(expected)
    assert FlowMoTokenScheduler().config.guidance_schedule == "cosine-power"


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
def test_scale_one_is_no_guidance_at_any_step(schedule):
    """Catches a weight that is 1 but for rounding, which costs a second pass."""
    scheduler = FlowMoTokenScheduler(guidance_schedule=schedule)
    scheduler.set_timesteps(50)
    assert scheduler.guidance_weights(1.0) == [1.0] * 50


# Use


def test_timesteps_count_down():
    """Catches timesteps that a progress bar or a callback cannot read."""
    scheduler = FlowMoTokenScheduler()
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [2, 1, 0] and scheduler.num_inference_steps == 3 and scheduler.order == 1
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == 64


def test_a_scheduler_serves_many_runs():
    """Catches state that is left over from the run before, one that was not finished above all."""
    scheduler = FlowMoTokenScheduler()
    expected = run(scheduler, 4, all_masked())[-1]
    scheduler.set_timesteps(9)
    half = all_masked()
    half[:, 4:] = 0
    scheduler.step(random_logits(), 8, half)
    assert torch.equal(run(scheduler, 4, all_masked())[-1], expected)


def test_outputs():
    """Catches a tuple in another form than the output class, or an input that is written over."""
    scheduler, sample = FlowMoTokenScheduler(temperature=0.0, noise_temperature=0.0), all_masked()
    scheduler.set_timesteps(2)
    output = scheduler.step(random_logits(), 1, sample)
    scheduler.set_timesteps(2)
    (prev_sample,) = scheduler.step(random_logits(), 1, sample, return_dict=False)
    assert isinstance(output, FlowMoTokenSchedulerOutput) and torch.equal(prev_sample, output.prev_sample)
    assert prev_sample.dtype == torch.int64 and (sample == -1).all()


def test_configuration_is_saved(tmp_path):
    """Catches an argument that is not registered: a pipeline would load with another sampler."""
    changes = {
        "mask_schedule": "cosine",
        "temperature": 0.9,
        "noise_temperature": 2.5,
        "noise_decay": "constant",
        "guidance_schedule": "linear",
        "guidance_power": 1.5,
    }
    FlowMoTokenScheduler(**changes).save_pretrained(tmp_path)
    loaded = FlowMoTokenScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in changes} == changes
    assert {name for name in loaded.config if not name.startswith("_")} == set(changes)
    other = FlowMoTokenScheduler.from_config(loaded.config, temperature=0.0)
    assert other.config.temperature == 0.0 and other.config.mask_schedule == "cosine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_schedule": "square"}, "mask_schedule='square' is unknown.*arccos"),
        ({"noise_decay": "cosine"}, "noise_decay='cosine' is unknown.*linear.*constant"),
        ({"guidance_schedule": "power"}, "guidance_schedule='power' is unknown.*cosine-power"),
        ({"temperature": -0.1}, "temperature=-0.1 must be a number of at least 0"),
        ({"noise_temperature": -1}, "noise_temperature=-1 must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a number"),
        ({"noise_temperature": float("inf")}, "noise_temperature=inf must be a number"),
        ({"guidance_power": 0}, "guidance_power=0 must be a positive number"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    """Catches an option that is misspelt and passed over, or fails in the middle of a run."""
    with pytest.raises(ValueError, match=message):
        FlowMoTokenScheduler(**changes)


def test_steps_out_of_turn_are_refused():
    """Catches a step without a start, one too many, or logits of another shape, whose results would be nonsense."""
    scheduler = FlowMoTokenScheduler()
    for call in (lambda: scheduler.step(random_logits(), 0, all_masked()), lambda: scheduler.guidance_weights(2.0)):
        with pytest.raises(ValueError, match="num_inference_steps is not set.*set_timesteps"):
            call()
    for steps in (0, -3):
        with pytest.raises(ValueError, match=f"num_inference_steps={steps} must be at least 1"):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(1)
    for logits in (random_logits(3), random_logits()[:, :7], random_logits()[..., 0]):
        with pytest.raises(ValueError, match=r"model_output has shape.*expected \(b, tokens, groups, values\)"):
            scheduler.step(logits, 0, all_masked())
    scheduler.step(random_logits(), 0, all_masked())
    with pytest.raises(ValueError, match="last step is done.*set_timesteps"):
        scheduler.step(random_logits(), 0, all_masked())
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match="generator is a list of 1"):
        scheduler.step(random_logits(), 0, all_masked(), [torch.Generator()])
