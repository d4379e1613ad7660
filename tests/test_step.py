"""One step of training is what it says: forward, backward, update; and no update where something is not finite."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from processes import on_processes, own_accelerators
from torch import nn

from flowmo_diffusers.engine.checkpoints import Progress
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.norms import NormRescaler
from flowmo_diffusers.engine.step import TrainStep


DECAY, EVERY, RATE = 0.9, 2, 0.05


@pytest.fixture(autouse=True)
def separate() -> Iterator[None]:
    with own_accelerators():
        yield


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 3))
    model[3].requires_grad_(False)
    return model


def build_optimizer(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: TrainStep

    def __call__(self, *batches: torch.Tensor, compute_losses=None) -> dict[str, torch.Tensor]:
        return self.step(batches, compute_losses or self.losses)

    def losses(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return losses(self.step.model, x)

    def state(self) -> dict:
        """Weights, moments and averages."""
        return copy.deepcopy(
            {
                "weights": list(self.model.parameters()),
                "moments": [self.optimizer.state[p] for p in self.model.parameters()],
                "averages": self.step.ema.shadow_params,
                "updates": self.step.ema.optimization_step,
            }
        )


def losses(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = model(x)
    return {"loss": (y - x[:, :3]).square().mean() + y.abs().mean(), "size": y.abs().mean()}


def start(accumulation: int = 1, **options) -> Run:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = build_model()
    raw, lr_scheduler = build_optimizer(model)
    trained, optimizer = accelerator.prepare(model, raw)
    ema = EMA(model.parameters(), DECAY, EVERY)
    rescaler = NormRescaler([model[0].weight, model[2].weight])
    step = TrainStep(accelerator, trained, optimizer, lr_scheduler, Progress(), ema, rescaler, **options)
    return Run(model, raw, step)


def data(steps: int, batch: int = 8) -> torch.Tensor:
    return torch.randn(steps, batch, 4, generator=torch.Generator().manual_seed(1))


def plain_loop(steps: int, max_grad_norm: float = math.inf) -> dict:
    """The same training in the words of torch alone."""
    model = build_model()
    optimizer, lr_scheduler = build_optimizer(model)
    averages = [p.detach().clone() for p in model.parameters()]
    matrices = [model[0].weight, model[2].weight]
    initial = [weight.detach().norm() for weight in matrices]
    seen = []
    for step, x in enumerate(data(steps)):
        found = losses(model, x)
        found["loss"].backward()
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        with torch.no_grad():
            for weight, reference in zip(matrices, initial, strict=True):
                weight /= weight.norm() / reference
            if step % EVERY == 0:
                for average, parameter in zip(averages, model.parameters(), strict=True):
                    if parameter.requires_grad:
                        average.sub_(average - parameter, alpha=1 - DECAY**EVERY)
        seen.append({name: value.detach() for name, value in found.items()} | {"gradient_norm": norm})
    moments = [optimizer.state[p] for p in model.parameters()]
    weights, updates = list(model.parameters()), len(range(0, steps, EVERY))
    return {
        "losses": seen,
        "state": {"weights": weights, "moments": moments, "averages": averages, "updates": updates},
        "lr": lr_scheduler.get_last_lr(),
    }


@pytest.mark.parametrize("max_grad_norm", [None, 0.8])
def test_equals_a_plain_loop(max_grad_norm):
    """Catches, in bits, a step in another order (averages before rescaling), another clipping, or work left out."""
    expected = plain_loop(5, max_grad_norm or math.inf)
    run = start(max_grad_norm=max_grad_norm)
    seen = [run(x) for x in data(5)]
    torch.testing.assert_close(seen, expected["losses"], rtol=0, atol=0)
    torch.testing.assert_close(run.state(), expected["state"], rtol=0, atol=0)
    assert run.step.lr_scheduler.get_last_lr() == expected["lr"]
    assert vars(run.step.progress) == vars(Progress()) | {"step": 5}
    if max_grad_norm:
        norms = [found["gradient_norm"].item() for found in seen]
        assert min(norms) < max_grad_norm < max(norms)  # some of the steps are clipped


def test_clipping_is_over_all_gradients():
    """Catches gradients that are clipped one by one, before they are accumulated, or to another norm."""
    run = start(accumulation=2, max_grad_norm=0.1)
    seen = []
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in run.model.parameters() if p.grad is not None)
    )
    found = run(*data(2))
    model = build_model()
    for x in data(2):
        (losses(model, x)["loss"] / 2).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert found["gradient_norm"].item() == pytest.approx(nn.utils.get_total_norm(gradients).item(), rel=1e-6)
    assert found["gradient_norm"] > 0.1
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(seen, gradients)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_batches_are_one(accumulation):
    """Catches losses that are summed, updates after each batch, or a step counted for each."""
    whole = start()
    seen = [whole(x) for x in data(3)]
    with own_accelerators():
        parts = start(accumulation)
        found = [parts(*x.chunk(accumulation)) for x in data(3)]
    torch.testing.assert_close(found, seen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.state(), whole.state(), rtol=1e-5, atol=1e-6)
    assert parts.step.lr_scheduler.get_last_lr() == whole.step.lr_scheduler.get_last_lr()
    assert parts.step.progress.step == 3


def share(accumulation: int) -> tuple[list, dict, list[float], dict]:
    """Three steps on this process's share of the batch."""
    run = start(accumulation, max_grad_norm=0.5)
    first = run.step.accelerator.process_index * accumulation
    parts = [x.chunk(2 * accumulation)[first : first + accumulation] for x in data(3)]
    seen = [run(*batches) for batches in parts]
    return seen, run.state(), run.step.lr_scheduler.get_last_lr(), vars(run.step.progress)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one(accumulation):
    """Catches gradients that are not averaged, or a schedule that runs on once for each process."""
    whole = start(max_grad_norm=0.5)
    expected = [whole(x) for x in data(3)]
    found = on_processes(2, share, accumulation)
    for seen, state, rate, progress in found:
        torch.testing.assert_close(state, whole.state(), rtol=1e-5, atol=1e-6)
        assert rate == whole.step.lr_scheduler.get_last_lr() and progress["step"] == 3
        norms = [[step["gradient_norm"] for step in steps] for steps in (seen, expected)]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=1e-6)
    for both in zip(*(seen for seen, *_ in found), expected, strict=True):
        ours, theirs, joint = (step["loss"].item() for step in both)
        assert (ours + theirs) / 2 == pytest.approx(joint, rel=1e-5) and ours != theirs


# What is not finite


def nan_loss(run: Run, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = run.losses(x)
    return found | {"loss": found["loss"] * math.nan}


def infinite_loss(run: Run, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Its gradient is finite."""
    found = run.losses(x)
    return found | {"loss": found["loss"] + math.inf}


def infinite_gradient(run: Run, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Its loss is finite."""
    found = run.losses(x)
    return found | {"loss": found["loss"] + (0 * run.model[2].bias.sum()).sqrt()}


BROKEN = [nan_loss, infinite_loss, infinite_gradient]


def go_wrong(broken, where: int, batch: int, accumulation: int, max_grad_norm: float | None) -> dict:
    """Four steps. The third, after which averages are due, is broken in one batch on one process."""
    run = start(accumulation, max_grad_norm=max_grad_norm)
    after = []
    for number, x in enumerate(data(4)):
        compute = [run.losses] * accumulation
        if number == 2 and run.step.accelerator.process_index == where:
            compute[batch] = lambda x: broken(run, x)
        calls = iter(compute)
        run(*x.chunk(accumulation), compute_losses=lambda x, calls=calls: next(calls)(x))
        after.append((run.state(), vars(run.step.progress).copy(), run.step.lr_scheduler.get_last_lr()[0]))
    return {"after": after, "gradients": [p.grad for p in run.model.parameters()]}


def assert_passed_over(found: dict) -> None:
    _, (before, _, _), (after, progress, rate), (end, last, _) = found["after"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (progress["step"], progress["skipped"], progress["skipped_in_a_row"]) == (3, 1, 1)
    assert rate == pytest.approx(RATE / 4)  # the schedule goes on
    assert (last["step"], last["skipped"], last["skipped_in_a_row"]) == (4, 1, 0)
    assert not torch.equal(end["weights"][0], after["weights"][0])
    assert end["moments"][0]["step"] == 3 and end["weights"][0].isfinite().all()
    gradients = [gradient for gradient in found["gradients"] if gradient is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)  # of the last step alone


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_not_finite_is_passed_over(broken, max_grad_norm):
    """Catches weights, moments or averages spoilt by one bad batch, its gradient left over, or an end to training."""
    assert_passed_over(go_wrong(broken, 0, 0, 1, max_grad_norm))


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize(("where", "batch"), [(0, 0), (1, 1)])
def test_what_is_not_finite_on_one_process(broken, where, batch):
    """Catches processes of which one steps and the other does not: their weights are never the same again."""
    found = on_processes(2, go_wrong, broken, where, batch, 2, None)
    for one in found:
        assert_passed_over(one)
    torch.testing.assert_close(found[0]["after"], found[1]["after"], rtol=0, atol=0)


def skip_until_the_end(max_skipped: int, finite: int) -> list[int]:
    """Steps at which a run ends that breaks on its second process alone, but for each so-and-so-many-th step."""
    run = start(max_skipped=max_skipped)
    x = data(1)[0]
    for number in range(1, 13):
        breaks = run.step.accelerator.process_index == 1 and number % finite
        try:
            run(x, compute_losses=lambda x, breaks=breaks: nan_loss(run, x) if breaks else run.losses(x))
        except FloatingPointError as error:
            row = f"{max_skipped + 1} steps in a row, the last of them step {number}, had a loss or gradient"
            assert str(error).startswith(row) and "gradient_norm nan" in str(error)
            return [number, run.step.progress.skipped]
    return [0, run.step.progress.skipped]


@pytest.mark.parametrize(
    ("max_skipped", "finite", "ends"), [(2, 100, [3, 3]), (0, 100, [1, 1]), (2, 3, [0, 8]), (1, 3, [2, 2])]
)
def test_too_many_in_a_row_end_the_run(max_skipped, finite, ends):
    """Catches a run that is lost and goes on, that a few bad batches far apart end, or that ends on one process."""
    assert on_processes(2, skip_until_the_end, max_skipped, finite) == [ends, ends]


@pytest.mark.parametrize("broken", [None, infinite_gradient, infinite_loss])
def test_gradient_scaler(broken, monkeypatch):
    """Catches float16 whose scale does not fall where gradients overflow, or a scaler that steps on a broken loss."""
    run = start()
    accelerator = run.step.accelerator
    monkeypatch.setitem(accelerator.state._shared_state, "_mixed_precision", "fp16")
    monkeypatch.setattr(accelerator, "native_amp", True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    run.step.optimizer = AcceleratedOptimizer(run.optimizer, scaler=accelerator.scaler)
    accelerator._optimizers = [run.step.optimizer]
    before, compute = run.state(), (lambda x: broken(run, x)) if broken else run.losses
    found = run(*data(1), compute_losses=compute)
    if broken:
        torch.testing.assert_close(run.state(), before, rtol=0, atol=0)
    else:
        plain = plain_loop(1)
        assert found["gradient_norm"].item() == pytest.approx(plain["losses"][0]["gradient_norm"].item(), rel=1e-2)
        torch.testing.assert_close(run.state()["weights"], plain["state"]["weights"], rtol=1e-2, atol=1e-2)
    assert run.step.progress.skipped == bool(broken)
    assert accelerator.scaler.get_scale() == (128 if broken is infinite_gradient else 256)
    run(*data(1))
    assert not torch.equal(run.state()["weights"][0], before["weights"][0])
