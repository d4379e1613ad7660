"""FlowMoScheduler: the times of the flow, the steps between them, and the noise of training."""

import math

import pytest
import torch

from flowmo_diffusers import FlowMoScheduler
from flowmo_diffusers.schedulers.scheduling_flowmo import SOLVERS


def integrate(scheduler, velocity, x, num_inference_steps):
    """The sampling loop, and the times at which the velocity was asked."""
    scheduler.set_timesteps(num_inference_steps)
    asked = []
    for timestep in scheduler.timesteps:
        t = timestep.item() / scheduler.config.num_train_timesteps
        asked.append(t)
        x = scheduler.step(velocity(x, t), timestep, x).prev_sample
    return x, asked


def curved(x, t):
    """dx/dt = 2 t x, whose solution x(t) = x(1) exp(t^2 - 1) falls to x(1) / e at t = 0."""
    return 2 * t * x


@pytest.mark.parametrize("num_inference_steps", [1, 2, 8, 25])
def test_grid_is_the_papers(num_inference_steps):
    """Would catch another power or direction, or a grid without t = 1 or t = 0."""
    scheduler = FlowMoScheduler()
    scheduler.set_timesteps(num_inference_steps)
    n = num_inference_steps
    expected = torch.tensor([((n - i) / n) ** 4 for i in range(n + 1)], dtype=torch.float32)
    torch.testing.assert_close(scheduler.times, expected, rtol=1e-6, atol=0)
    assert scheduler.times[0] == 1 and scheduler.times[-1] == 0


def test_rho_one_is_an_even_grid():
    """Would catch a power that is not read from the config."""
    scheduler = FlowMoScheduler(rho=1.0)
    scheduler.set_timesteps(4)
    assert scheduler.times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_timesteps_are_times_in_training_units():
    """Would catch a model that is asked at t = 0, at the wrong scale or in another dtype than float32."""
    scheduler = FlowMoScheduler(num_train_timesteps=200, rho=2.0)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [200.0, 50.0]
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.init_noise_sigma == 1.0 and len(scheduler) == 200


def test_default_is_25_steps():
    """Would catch another default than the paper's."""
    scheduler = FlowMoScheduler()
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 25


def test_timesteps_follow_the_device_and_times_do_not():
    """Would catch a loop that waits for the device at every step, or timesteps left behind on the CPU."""
    scheduler = FlowMoScheduler()
    scheduler.set_timesteps(3, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert scheduler.times.device.type == "cpu"


def test_euler_step_by_hand():
    """Would catch a wrong sign, a wrong step width or the same width at every step."""
    scheduler = FlowMoScheduler(rho=2.0)
    scheduler.set_timesteps(2)  # t = 1, 0.25, 0
    x = torch.full((1, 1, 1, 1), 1.0)
    x = scheduler.step(torch.full_like(x, 4.0), scheduler.timesteps[0], x).prev_sample
    assert x.item() == 1 - 0.75 * 4
    (x,) = scheduler.step(torch.full_like(x, 8.0), scheduler.timesteps[1], x, return_dict=False)
    assert x.item() == -2 - 0.25 * 8
    assert scheduler.step_index == 2


def test_heun_step_by_hand():
    """Would catch a mean taken from the predicted point, or a last step that is not plain Euler."""
    scheduler = FlowMoScheduler(rho=2.0, solver="heun")
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000.0, 250.0, 250.0]
    x = torch.full((1, 1, 1, 1), 1.0)
    velocities, expected = [4.0, 8.0, 16.0], [1 - 0.75 * 4, 1 - 0.75 * 6, -3.5 - 0.25 * 16]
    for v, timestep, value in zip(velocities, scheduler.timesteps, expected, strict=True):
        x = scheduler.step(torch.full_like(x, v), timestep, x).prev_sample
        assert x.item() == value


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_inference_steps", [1, 2, 7])
def test_straight_flow_is_exact(solver, num_inference_steps):
    """Would catch steps that do not add up to the whole way from noise to image."""
    x, z = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found, _ = integrate(FlowMoScheduler(solver=solver), lambda x_t, t: z - x, z, num_inference_steps)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rho", [1.0, 4.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order, rho):
    """Would catch a Heun step that corrects at the wrong time or with the wrong weights: it would be first order."""
    errors = []
    for n in (16, 32, 64):
        x, _ = integrate(FlowMoScheduler(rho=rho, solver=solver), curved, torch.ones(1, 1, 1, 1), n)
        errors.append(abs(x.item() - math.exp(-1)))
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 0.8 * 2**order < coarse / fine < 1.25 * 2**order


@pytest.mark.parametrize("n", [1, 2, 25])
def test_model_calls(n):
    """Would catch a Heun solver that asks at t = 0, not twice in between, or keeps a batch in memory at the end."""
    scheduler = FlowMoScheduler(solver="heun")
    _, asked = integrate(scheduler, curved, torch.ones(1, 1, 1, 1), n)
    assert len(asked) == 2 * n - 1 and scheduler._heun_start is None
    assert asked[1::2] == asked[2::2] and min(asked) > 0
    _, asked = integrate(FlowMoScheduler(), curved, torch.ones(1, 1, 1, 1), n)
    assert len(asked) == n


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("given", ["begin_index", "timestep"])
def test_sampling_from_the_middle(solver, given):
    """Would catch a Heun run begun at the correcting one of two equal times, which then asks at the wrong ones."""
    scheduler = FlowMoScheduler(rho=1.0, solver=solver)
    scheduler.set_timesteps(64)
    begin = 32 * scheduler.order
    if given == "begin_index":
        scheduler.set_begin_index(begin)
    assert scheduler.timesteps[begin] == 500
    x = torch.full((1, 1, 1, 1), math.exp(-0.75))
    for timestep in scheduler.timesteps[begin:]:
        x = scheduler.step(curved(x, timestep.item() / 1000), timestep, x).prev_sample
    assert scheduler.step_index == len(scheduler.timesteps)
    assert abs(x.item() - math.exp(-1)) < {"euler": 1e-2, "heun": 2e-4}[solver]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32(solver, dtype):
    """Would catch steps computed in half precision, which lose the small late steps."""
    generator = torch.Generator().manual_seed(0)
    x, *velocities = torch.randn(4, 1, 3, 8, 8, generator=generator).to(dtype)
    halves, singles = FlowMoScheduler(solver=solver), FlowMoScheduler(solver=solver)
    halves.set_timesteps(2)
    singles.set_timesteps(2)
    y = x
    for v, timestep in zip(velocities, halves.timesteps, strict=False):
        expected = singles.step(v.float(), timestep, y.float()).prev_sample.to(dtype)
        y = halves.step(v, timestep, y).prev_sample
        assert y.dtype == dtype and torch.equal(y, expected)
    assert not torch.equal(x - (halves.times[0] - halves.times[1]).to(dtype) * velocities[0], expected)


def test_heun_sums_half_precision_velocities_without_overflow():
    """Would catch velocities that are added in float16, whose largest number is 65504."""
    scheduler = FlowMoScheduler(rho=1.0, solver="heun")
    scheduler.set_timesteps(2)
    v = torch.full((1, 1, 1, 1), 6e4, dtype=torch.float16)
    x = torch.zeros_like(v)
    for timestep in scheduler.timesteps[:2]:
        x = scheduler.step(v, timestep, x).prev_sample
    assert x.item() == -3e4


def test_sample_keeps_its_dtype_under_a_half_precision_model():
    """Would catch float32 latents that turn bfloat16 because the velocity is."""
    scheduler = FlowMoScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 3, 4, 4)
    assert scheduler.step(x.bfloat16(), scheduler.timesteps[0], x).prev_sample.dtype == torch.float32


def test_add_noise_at_continuous_times():
    """Would catch times that are rounded to whole timesteps, or noise and image exchanged."""
    x, z = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0.0, 123.4, 1000.0])
    noisy = FlowMoScheduler().add_noise(x, z, timesteps)
    assert torch.equal(noisy[0], x[0]) and torch.equal(noisy[2], z[2])
    torch.testing.assert_close(noisy[1], 0.1234 * z[1] + 0.8766 * x[1])
    torch.testing.assert_close(FlowMoScheduler().add_noise(x, z, timesteps[1])[1], noisy[1])


def test_add_noise_is_float32_inside():
    """Would catch an interpolation in half precision, or one that changes the sample's dtype."""
    x, z = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    noisy = FlowMoScheduler().add_noise(x, z, torch.tensor([123.4, 567.8]))
    expected = FlowMoScheduler().add_noise(x.float(), z.float(), torch.tensor([123.4, 567.8])).bfloat16()
    assert noisy.dtype == torch.bfloat16 and torch.equal(noisy, expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_set_timesteps_forgets_the_last_run(solver):
    """Would catch a run that goes on where a broken-off one stopped, or corrects with its velocity."""
    scheduler = FlowMoScheduler(solver=solver)
    x = torch.ones(1, 1, 1, 1)
    expected, _ = integrate(scheduler, curved, x, 4)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    scheduler.step(100 * x, scheduler.timesteps[2], x)
    found, _ = integrate(scheduler, curved, x, 4)
    assert torch.equal(found, expected)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None


def test_recipe_round_trip(tmp_path):
    """Would catch a model's own steps or guidance that are not saved, or a grid that is laid without them."""
    FlowMoScheduler(num_inference_steps=4, guidance_scale=1.0, guidance_interval=(0.5, 2.0)).save_pretrained(tmp_path)
    loaded = FlowMoScheduler.from_pretrained(tmp_path)
    assert loaded.config.guidance_scale == 1.0 and tuple(loaded.config.guidance_interval) == (0.5, 2.0)
    loaded.set_timesteps()
    assert loaded.num_inference_steps == len(loaded.timesteps) == 4


def test_config_round_trip(tmp_path):
    """Would catch an argument that is not saved, or a solver that is saved but not built."""
    scheduler = FlowMoScheduler(num_train_timesteps=500, rho=2.0, solver="heun")
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMoScheduler.from_pretrained(tmp_path)
    changed = FlowMoScheduler.from_config(scheduler.config, solver="euler")
    for other, solver, order in ((loaded, "heun", 2), (changed, "euler", 1)):
        config = (other.config.num_train_timesteps, other.config.rho, other.config.solver)
        assert config == (500, 2.0, solver) and other.order == order


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "midpoint"}, "solver='midpoint'"),
        ({"rho": 0.0}, "rho=0.0"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_interval": (2.0, 1.0)}, r"guidance_interval=\(2.0, 1.0\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    """Would catch a scheduler that is built from nonsense and samples noise."""
    with pytest.raises(ValueError, match=message):
        FlowMoScheduler(**arguments)


@pytest.mark.parametrize("num_inference_steps", [0, -1])
def test_no_steps_are_refused(num_inference_steps):
    """Would catch an empty grid, which returns the noise as the image."""
    with pytest.raises(ValueError, match="num_inference_steps"):
        FlowMoScheduler().set_timesteps(num_inference_steps)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_off_the_grid_are_refused(solver):
    """Would catch a step without a grid, at a time that is not on it (an index, say), or beyond its end."""
    scheduler = FlowMoScheduler(solver=solver)
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep=1 is not on the grid"):
        scheduler.step(x, 1, x)
    integrate(scheduler, curved, x, 2)
    with pytest.raises(ValueError, match="last step is done"):
        scheduler.step(x, scheduler.timesteps[0], x)
