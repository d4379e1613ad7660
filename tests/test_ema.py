"""The average of the weights."""

import pytest
import torch
from torch import nn

from flowmo_diffusers.engine.ema import EMA


def walk(parameter: nn.Parameter, ema: EMA, steps: range) -> None:
    """A parameter that is the number of its step, and its average."""
    for step in steps:
        parameter.data.fill_(step + 1)
        ema.update([parameter], step)


@pytest.mark.parametrize("update_every", [1, 3, 10])
def test_ema_is_the_recurrence(update_every):
    """Catches a warm-up, a first update that copies the weights, decay of another power, or a shifted cadence."""
    parameter = nn.Parameter(torch.zeros(2))
    ema = EMA([parameter], decay=0.9, update_every=update_every)
    expected = 0.0
    for step in range(25):
        walk(parameter, ema, range(step, step + 1))
        if step % update_every == 0:
            expected = 0.9**update_every * expected + (1 - 0.9**update_every) * (step + 1)
        assert ema.shadow_params[0].tolist() == pytest.approx([expected] * 2, rel=1e-5), f"step {step}"


def test_ema_copies_what_is_frozen():
    """Catches an average that trails behind a frozen encoder, whose codes the decoder no longer sees."""
    moving, frozen = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)
    ema = EMA([moving, frozen], decay=0.9, update_every=1)
    moving.data.fill_(1)
    frozen.data.fill_(1)
    ema.update([moving, frozen], 0)
    assert [p.item() for p in ema.shadow_params] == pytest.approx([0.1, 1])


def test_ema_applied():
    """Catches a validation of the raw weights, or after which training goes on from the averages or averages on."""
    parameter = nn.Parameter(torch.zeros(2))
    ema = EMA([parameter], decay=0.5, update_every=1)
    walk(parameter, ema, range(1))
    place, average = parameter.data_ptr(), ema.shadow_params[0]
    with pytest.raises(RuntimeError, match="no validation"):
        with ema.applied([parameter]):
            assert parameter.tolist() == [0.5, 0.5]
            assert torch.is_grad_enabled()
            raise RuntimeError("no validation")
    assert parameter.tolist() == [1, 1] and parameter.data_ptr() == place and parameter.requires_grad
    assert ema.shadow_params[0] is average and average.tolist() == [0.5, 0.5]


def test_ema_resumes():
    """Catches a resumed average that restarts from the raw weights, or that shares memory with what was saved."""
    parameter = nn.Parameter(torch.zeros(2))
    through = EMA([parameter], decay=0.9, update_every=3)
    walk(parameter, through, range(5))
    state = through.state_dict()
    resumed = EMA([nn.Parameter(torch.full((2,), 7.0))], decay=0.9, update_every=3)
    resumed.load_state_dict(state)
    walk(parameter, resumed, range(5, 20))
    walk(parameter, through, range(5, 20))
    assert torch.equal(resumed.shadow_params[0], through.shadow_params[0])
    assert resumed.state_dict().keys() == state.keys()


def test_ema_state_has_no_say_in_decay():
    """Catches an --ema_decay that a resumed run ignores, while --ema_update_every counts."""
    parameter = nn.Parameter(torch.zeros(1))
    resumed = EMA([parameter], decay=0.5, update_every=2)
    resumed.load_state_dict(EMA([parameter], decay=0.9, update_every=1).state_dict())
    walk(parameter, resumed, range(1))
    assert resumed.shadow_params[0].item() == pytest.approx(0.75)


def test_ema_state_stays_on_the_models_device():
    """Catches averages left on the CPU, where checkpoints are read: the next update on a GPU would fail."""
    state = EMA([nn.Parameter(torch.zeros(2))]).state_dict()
    ema = EMA([nn.Parameter(torch.zeros(2, device="meta"))])
    ema.load_state_dict(state)
    assert ema.shadow_params[0].device.type == "meta"


@pytest.mark.parametrize("others", [[], [torch.zeros(3)], [torch.zeros(2), torch.zeros(2)]])
def test_ema_refuses_the_state_of_another_model(others):
    """Catches averages of another model that are taken over and surface at the next update or at the export."""
    state = EMA([nn.Parameter(other) for other in others]).state_dict()
    with pytest.raises(ValueError, match=f"state holds {len(others)} averages, which do not fit the 1 parameters"):
        EMA([nn.Parameter(torch.zeros(2))]).load_state_dict(state)
