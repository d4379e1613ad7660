"""The trajectory of a reconstruction."""

import PIL.Image
import pytest
import torch

from flowmo_diffusers import FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.pipelines.animation import Trajectory


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_states_are_those_of_the_flow(tiny_pipeline: FlowMoPipeline, images: torch.Tensor, solver: str):
    """A half step of Heun's method taken for a step, times of other states, or a last state that is not the image."""
    tiny_pipeline.scheduler = FlowMoScheduler(solver=solver)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    trajectory = Trajectory(noise)
    output = tiny_pipeline(
        images, num_inference_steps=4, latents=noise, output_type="latent", callback_on_step_end=trajectory
    )
    assert trajectory.times == pytest.approx([(k / 4) ** 4 for k in (4, 3, 2, 1, 0)])
    assert torch.equal(trajectory.samples[0], noise)
    assert torch.equal(trajectory.samples[-1].clamp(-1, 1), output.images)


def test_estimates_are_the_model_s(tiny_pipeline: FlowMoPipeline, images: torch.Tensor):
    """Estimates of another time's velocity, or of the unguided one."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    trajectory = Trajectory(noise)
    with torch.no_grad():
        codes = tiny_pipeline.autoencoder.encode(images).codes
        tiny_pipeline.decode(codes, num_inference_steps=3, latents=noise, callback_on_step_end=trajectory)
        for t, x_t, x_0 in zip(trajectory.times[:-1], trajectory.samples, trajectory.estimates(), strict=False):
            guided = 0.17 / 1.17 <= t <= 1.02 / 2.02
            v = tiny_pipeline._velocity(x_t, torch.tensor(t), codes, 1.5 if guided else None)
            torch.testing.assert_close(x_0, x_t - t * v, rtol=1e-3, atol=1e-4)
    assert [0.17 / 1.17 <= t <= 1.02 / 2.02 for t in trajectory.times] == [False, True, False, False]


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif"])
def test_animation(tiny_pipeline: FlowMoPipeline, images: torch.Tensor, tmp_path, suffix: str):
    """An animation of one frame, that stops, that does not hold its end, or that is smoothed."""
    trajectory = Trajectory()
    for steps in (5, 3):  # of the last call alone
        tiny_pipeline(images, num_inference_steps=steps, callback_on_step_end=trajectory)
    path = tmp_path / f"trajectory{suffix}"
    trajectory.save(path, scale=2, milliseconds=50, hold=500)
    with PIL.Image.open(path) as animation:
        assert (animation.n_frames, animation.size, animation.info["loop"]) == (3, (64, 64), 0)
        durations = []
        for frame in range(3):
            animation.seek(frame)
            animation.load()
            durations.append(animation.info["duration"])
        assert durations == [50, 50, 500]
        last = animation.convert("RGB")
        halved = last.resize((32, 32), PIL.Image.Resampling.NEAREST)
        assert halved.resize((64, 64), PIL.Image.Resampling.NEAREST).tobytes() == last.tobytes()
        if suffix != ".gif":  # which has 256 colours
            assert halved.tobytes() == trajectory.frames()[-1].tobytes()
    assert list(tmp_path.iterdir()) == [path]


def test_refused(tiny_pipeline: FlowMoPipeline, tmp_path):
    """An animation of nothing, of tokens, or in a format that PIL would write a single picture to."""
    trajectory = Trajectory()
    with pytest.raises(ValueError, match="is empty"):
        trajectory.save(tmp_path / "x.webp")
    with pytest.raises(ValueError, match="must end in one of .gif, .png, .webp"):
        trajectory.save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="latents are tokens"):
        trajectory(tiny_pipeline, 0, torch.tensor(1000.0), {"latents": torch.zeros(1, 8, 2, dtype=torch.int64)})
    assert not list(tmp_path.iterdir())
