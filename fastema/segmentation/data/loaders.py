"""Datasets, the sampler and the loaders.

An image's augmentation is drawn from a seed made of run, epoch and image, which comes with its index. So it depends
neither on the number of workers or processes nor on what ran before, and a resumed run sees the same images.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# In a worker process too, which imports this module again.
import fastema.segmentation.torchvision_shim  # noqa: F401

# isort: split

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastema.errors import UserError
from fastema.segmentation.data.images import read_pair
from fastema.segmentation.data.listing import Pair
from fastema.segmentation.data.masks import IGNORED
from fastema.segmentation.devices import accelerator


class Draw(NamedTuple):
    """An image's index, and the seed of its augmentation."""

    image: int
    seed: int


class Validation(NamedTuple):
    """A validation batch."""

    images: Tensor  # [N, 3, S, S] float32 in [0, 1]
    masks: list[Tensor]  # N of [H, W] bool, each at its file's size
    known: list[Tensor | None]  # N of [H, W] bool, False where nothing counts; None: all pixels count


def mix_seed(*parts: int) -> int:
    """Return one seed from several numbers; unlike with a sum, (1, 2) and (2, 1) differ."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def network_input(pixels: np.ndarray, size: int) -> Tensor:
    """Resize an image, uint8 [H, W, 3], to float32 [3, size, size] in [0, 1], regardless of its proportions."""
    image = v2.functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), [size, size], antialias=True)
    return image.float().div_(255)


class TrainingSet(Dataset[tuple[Tensor, Tensor]]):
    """Augmented images, float32 [3, S, S] in [0, 1], and masks, float32 [1, S, S] of 1, 0 and IGNORED."""

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

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        pixels, truth = read_pair(self.pairs[draw.image])
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(truth).view(torch.uint8)[None])  # int8 is resized as float
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw.seed)  # torch.manual_seed would seed the accelerators too
            image, mask = self._augment(image, mask)
        return image.as_subclass(Tensor).float().div_(255), mask.as_subclass(Tensor).view(torch.int8).float()


class ValidationSet(Dataset[tuple[Tensor, Tensor, Tensor | None]]):
    """Resized images, float32 [3, S, S] in [0, 1]; masks, bool [H, W] at their file's size; and which pixels count."""

    def __init__(self, pairs: Sequence[Pair], size: int) -> None:
        self.pairs = list(pairs)
        self._size = size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        pixels, truth = read_pair(self.pairs[index])
        mask = torch.from_numpy(truth)
        known = mask != IGNORED
        return network_input(pixels, self._size), mask == 1, None if known.all() else known


class EpochSampler(Sampler[Draw]):
    """This process's share, one in `world_size`, of an order that depends on the seed and the epoch alone.

    The order and the augmentation of each image are the same for any number of processes. Nothing is repeated to make
    the shares equal: that would count an image twice.

    Attributes:
        epoch: from 1; set it before each epoch.
    """

    def __init__(self, count: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.epoch = 1
        self._count = count
        self._seed = seed
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return len(range(self._rank, self._count, self._world_size))

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(mix_seed(self._seed, self.epoch))
        order = torch.randperm(self._count, generator=generator).tolist()
        for index in order[self._rank :: self._world_size]:
            yield Draw(index, mix_seed(self._seed, self.epoch, index))


def training_loader(dataset: TrainingSet, sampler: EpochSampler, batch_size: int, workers: int) -> DataLoader:
    """Return a loader of (images, masks) in the sampler's order; the last batch may be short.

    Iterating raises `UserError` when a file cannot be read any more, or a worker dies.
    """
    return _Loader(dataset, batch_size, workers, sampler=sampler)


def validation_loader(dataset: ValidationSet, batch_size: int, workers: int) -> DataLoader:
    """Return a loader of `Validation` batches in the dataset's order; errors as in `training_loader`."""
    return _Loader(dataset, batch_size, workers, collate_fn=_collate_validation)


def _collate_validation(samples: list[tuple[Tensor, Tensor, Tensor | None]]) -> Validation:
    images, masks, known = zip(*samples, strict=True)
    return Validation(torch.stack(images), list(masks), list(known))


def _ignore_interrupts(_: int) -> None:
    # A terminal sends Ctrl-C to the workers too: each would print a traceback before the parent ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Loader(DataLoader[Any]):
    def __init__(self, dataset: Dataset, batch_size: int, workers: int, **more: Any) -> None:
        super().__init__(
            dataset,
            batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=accelerator() is not None,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator().manual_seed(0),  # the global one is for dropout
            **more,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        try:
            yield from batches
        except (UserError, RuntimeError) as error:
            text = str(error)
            if isinstance(error, UserError):
                text = text.rpartition("UserError: ")[2].strip()  # a worker's has its traceback before it
            elif text.startswith("DataLoader worker"):
                text = (
                    f"a process that reads images died ({text.splitlines()[0]}). If memory ran out, lower "
                    "--num-workers; in a container, enlarge /dev/shm"
                )
            else:
                raise
            if self.num_workers > 0:
                # Left to the garbage collector, which waits 5 s for each worker.
                batches._shutdown_workers()  # type: ignore[attr-defined]
                self._iterator = None
            raise UserError(text) from error
