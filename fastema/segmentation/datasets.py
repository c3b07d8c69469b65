"""Pairs of files to batches of tensors.

The augmentation of an image is drawn from a seed that is made of run, epoch and image, and comes with the index. So
it does not depend on the number of workers nor on what ran before, and a resumed run sees what it would have seen.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastema.segmentation.layout import Pair
from fastema.segmentation.reading import read_image, read_mask
from fastema.segmentation.torchvision_shim import import_torchvision

import_torchvision()  # also in a worker process, which imports this module anew

from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import v2  # noqa: E402


class Draw(NamedTuple):
    """Which image, and the seed of its augmentation."""

    image: int
    seed: int


class Validation(NamedTuple):
    """A batch to validate on."""

    images: torch.Tensor  # [N, 3, S, S] float32 in [0, 1]
    masks: list[torch.Tensor]  # N of [H, W] bool, each at its file's own size


def seed_of(*parts: int) -> int:
    """One seed from several numbers; unlike a sum, (1, 2) and (2, 1) differ."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class TrainingSet(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Augmented images, float32 [3, S, S] in [0, 1], and masks, float32 [1, S, S] of 0 and 1."""

    def __init__(self, pairs: Sequence[Pair], size: int) -> None:
        self.pairs = list(pairs)
        self._augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
            ]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[draw.image]
        image = tv_tensors.Image(torch.from_numpy(read_image(pair.image)).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(read_mask(pair.mask))[None])
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the accelerators too.
            torch.default_generator.manual_seed(draw.seed)
            image, mask = self._augment(image, mask)
        return _unit(image), mask.as_subclass(torch.Tensor).float()


class ValidationSet(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Resized images, float32 [3, S, S] in [0, 1], and masks, bool [H, W] as they are in the file."""

    def __init__(self, pairs: Sequence[Pair], size: int) -> None:
        self.pairs = list(pairs)
        self._size = size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[index]
        image = torch.from_numpy(read_image(pair.image)).permute(2, 0, 1)
        image = v2.functional.resize(image, [self._size, self._size], antialias=True)
        return _unit(image), torch.from_numpy(read_mask(pair.mask)).bool()


class EpochSampler(Sampler[Draw]):
    """A new order every epoch, which depends on nothing but the seed and the epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.epoch = 1
        self._count = count
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(seed_of(self._seed, self.epoch))
        for index in torch.randperm(self._count, generator=generator).tolist():
            yield Draw(index, seed_of(self._seed, self.epoch, index))


def training_loader(dataset: TrainingSet, sampler: EpochSampler, batch_size: int, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_interrupts_to_the_parent,
        # The loader's own draws come from here and leave the global generator, which dropout uses, alone.
        generator=torch.Generator().manual_seed(0),
    )


def validation_loader(dataset: ValidationSet, batch_size: int, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_interrupts_to_the_parent,
        collate_fn=_collate,
    )


def _leave_interrupts_to_the_parent(_: int) -> None:
    # A terminal sends Ctrl-C to the whole group: every worker would print a traceback before the parent ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> Validation:
    return Validation(torch.stack([image for image, _ in samples]), [mask for _, mask in samples])


def _unit(image: torch.Tensor) -> torch.Tensor:
    return image.as_subclass(torch.Tensor).float().div_(255)
