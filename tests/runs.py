"""Runs that model cards are of."""

from flowmo_diffusers.hub.card_parts import TrainingRun


def short_run(dataset: str) -> TrainingRun:
    """One step of stage 1A at 16 x 16 pixels."""
    return TrainingRun(
        stage="pretrain",
        dataset=dataset,
        resolution=16,
        steps=1,
        images_seen=1,
        train_images=1,
        held_out_images=1,
        num_inference_steps=1,
        figures={"psnr": 20.0},
        options={},
        command=["train_flowmo.py"],
        device="CPU",
        num_processes=1,
        seconds=1,
    )
