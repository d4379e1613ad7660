#!/usr/bin/env python
"""
The Inception Score with a small classifier in Inception's place, where images are too small for Inception or its
classifier is not at hand; and how often it recognises the class that was asked for.

    python benchmarks/classifier_score.py --dataset cifar10 --samples evaluation.npz --epochs 4

The classifier is a ResNet of `transformers`, trained on the data set's training split. Its scores compare with each
other and with those of its own test images only.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from transformers import ResNetConfig, ResNetForImageClassification

from flowmo_diffusers.metrics.inception_score import inception_score


SIDE, BATCH = 64, 128
SIZES = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def load_split(dataset: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, h, w) uint8 and labels (n,)."""
    rows = load_dataset(dataset, split=split)
    images = torch.from_numpy(np.stack(rows.with_format("numpy")["image"][:]))
    return images.permute(0, 3, 1, 2), torch.tensor(rows["label"][:])


def prepare(images: torch.Tensor) -> torch.Tensor:
    return (F.interpolate(images / 255, (SIDE, SIDE), mode="bilinear", antialias=True) - 0.5) / 0.25


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> ResNetForImageClassification:
    model = ResNetForImageClassification(ResNetConfig(**SIZES, num_labels=int(labels.max()) + 1))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            mirrored = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, images[rows].flip(3), images[rows])
            loss = F.cross_entropy(model(prepare(mirrored)).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def probabilities(model: ResNetForImageClassification, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(prepare(part)).logits.softmax(-1) for part in images.split(250)])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="with the columns image and label, splits train and test")
    parser.add_argument("--samples", type=Path, nargs="+", required=True, help=".npz files of evaluate_generation.py")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = train(*load_split(args.dataset, "train"), args.epochs)
    test, labels = load_split(args.dataset, "test")
    count, classes = len(np.load(args.samples[0])["arr_0"]), int(labels.max()) + 1
    sets = {"test images": (test[:: len(test) // count], labels[:: len(test) // count])}
    for path in args.samples:  # classes were asked for in turn
        images = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)
        sets[str(path)] = images, torch.arange(len(images)) % classes
    print("| | images | score | classes recognised |\n|---|---:|---:|---:|")
    for name, (images, wanted) in sets.items():
        p = probabilities(model, images)
        recognised = (p.argmax(-1) == wanted).float().mean().item()
        print(f"| {name} | {len(images)} | {inception_score(p, len(p))[0]:.2f} | {100 * recognised:.1f} % |")


if __name__ == "__main__":
    main(parse_args())
