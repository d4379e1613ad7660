"""Training on images, whatever is trained: their batches, and those of them that cannot be read."""

import argparse
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin

from flowmo_diffusers.data.loading import BadImages, ShuffledImages, StreamedImages, image_batches
from flowmo_diffusers.engine.training import Task


class ImageTask(Task):
    """
    A [`Task`] on images. What it trains, and by which loss, is up to its subclass.

    Args:
        name: Of the task.
        model: To be trained.
        args: Options of [`~flowmo_diffusers.data.options`] and of the engine.
        images: To train on.
        originals: Held-out images (n, 3, h, w) in [-1, 1].
    """

    def __init__(
        self,
        name: str,
        model: ModelMixin,
        args: argparse.Namespace,
        accelerator: Accelerator,
        images: ShuffledImages | StreamedImages,
        originals: torch.Tensor,
    ):
        super().__init__(name, model, None if args.streaming else len(images), len(originals))
        self.args, self.accelerator, self.images = args, accelerator, images
        self.bad = BadImages(args.max_bad_fraction, self.num_images)
        self.states["bad"] = self.bad

    def batches(self, first: int, last: int) -> Iterable[dict]:
        return image_batches(
            self.images,
            self.args.train_batch_size,
            first,
            last,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.args.dataloader_num_workers,
        )

    def before_group(self, batches: Sequence[dict]) -> None:
        for batch in batches:
            self.bad.add(batch["bad"])

    def check(self, images_seen: int) -> dict[str, float]:
        if self.accelerator.num_processes > 1:
            self.bad.add(gather_object(list(self.bad.reasons.items())))
        self.bad.check(images_seen)
        return {"bad_images": len(self.bad)}
