"""What a run shows of itself."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from processes import on_processes, own_accelerators
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowmo_diffusers.engine.processes import on_any_process
from flowmo_diffusers.engine.tracking import RunningMeans, log_picture


def follow(values: dict[int, list[float]]) -> tuple[dict, dict, dict]:
    """What is read after the first two of this process's values, after one more, and after none."""
    accelerator = Accelerator(cpu=True)
    first, second, third = values[accelerator.process_index]
    means = RunningMeans()
    means.add({"loss": torch.tensor(first), "norm": torch.tensor(first, dtype=torch.bfloat16)})
    means.add({"loss": torch.tensor(second), "norm": torch.tensor(second, dtype=torch.bfloat16)})
    read = means.read(accelerator)
    means.add({"norm": torch.tensor(third)})
    return read, means.read(accelerator), means.read(accelerator)


def test_running_means_of_all_processes():
    """Catches figures of the first process alone, or means over steps that have been read already."""
    values = {0: [1.0, 2.0, 8.0], 1: [4.0, 5.0, 16.0]}
    for found in on_processes(2, follow, values):
        assert found == ({"loss": 3, "norm": 3}, {"norm": 12}, {})


def test_running_means_of_one_process():
    """Catches sums in the loss's own bfloat16, in which a thousand ones are 256, and a loss that adding changes."""
    means, one = RunningMeans(), torch.tensor(1.0, dtype=torch.bfloat16)
    kept = torch.tensor(1.0)
    for _ in range(1000):
        means.add({"half": one, "whole": kept})
    assert means.read(SimpleNamespace(reduce=lambda tensor, reduction: tensor)) == {"half": 1, "whole": 1}
    assert kept == 1


def flags() -> list[list[bool]]:
    accelerator = Accelerator(cpu=True)
    main = accelerator.is_main_process
    return [
        on_any_process(accelerator, main, not main, False, True),
        on_any_process(accelerator, torch.tensor(not main), torch.tensor(False)),
    ]


@pytest.mark.parametrize(("count", "seen"), [(1, [True, False, False, True]), (2, [True, True, False, True])])
def test_on_any_process(count, seen):
    """Catches processes that disagree on whether to stop or to skip, and wait for each other for ever."""
    assert on_processes(count, flags) == [[seen, [seen[1], False]]] * count


@pytest.fixture
def picture() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def test_picture_in_tensorboard(tmp_path, picture):
    """Catches a picture that TensorBoard refuses or shows turned, scaled, or under another step."""
    with own_accelerators():
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        accelerator.init_trackers("run")
        log_picture(accelerator, "validation", picture, 7)
        accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (found,) = events.Images("validation")
    (tmp_path / "shown.png").write_bytes(found.encoded_image_string)
    assert found.step == 7
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "shown.png").convert("RGB")), np.asarray(picture))


def test_picture_in_other_trackers(picture):
    """Catches Weights & Biases given an array in place of a list of pictures, or a tracker without pictures asked."""
    shown = []
    wandb = SimpleNamespace(name="wandb", log_images=lambda values, step: shown.append((values, step)))
    log_picture(SimpleNamespace(trackers=[SimpleNamespace(name="csv"), wandb]), "validation", picture, 7)
    assert shown == [({"validation": [picture]}, 7)]
