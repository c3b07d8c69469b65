"""Pairs of files to batches of tensors.

The augmentation of an image is drawn from a seed that is made of run, epoch and image, and comes with the index. So
it depends neither on the number of workers or processes nor on what ran before: a resumed run sees what it would have.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fastema.segmentation.data.images import read_pair
from fastema.segmentation.data.listing import Pair
from fastema.segmentation.errors import UserError
from fastema.segmentation.torchvision_shim import import_torchvision

import_torchvision()  # also in a worker process, which imports this module anew

from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

T = TypeVar("T")


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
        pixels, truth = read_pair(self.pairs[draw.image])
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(truth)[None])
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
        pixels, truth = read_pair(self.pairs[index])
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        image = v2.functional.resize(image, [self._size, self._size], antialias=True)
        return _unit(image), torch.from_numpy(truth).bool()


def share_of(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """One process's share: every `world_size`-th item from `rank` on, so that each is in exactly one share.

    The shares differ by at most one in length. Nothing is repeated to make them equal: on validation images that would
    change the mean, and in training an image would count twice.
    """
    return items[rank::world_size]


class EpochSampler(Sampler[Draw]):
    """A new order every epoch, which depends on nothing but the seed and the epoch; of it, this process's share.

    The order of the whole and the augmentation of each image are the same for any number of processes.

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
        return len(share_of(range(self._count), self._rank, self._world_size))

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(seed_of(self._seed, self.epoch))
        order = torch.randperm(self._count, generator=generator).tolist()
        for index in share_of(order, self._rank, self._world_size):
            yield Draw(index, seed_of(self._seed, self.epoch, index))


def training_loader(dataset: TrainingSet, sampler: EpochSampler, batch_size: int, workers: int) -> DataLoader:
    """Batches of (images, masks) in the sampler's order; the last one may be short.

    While it is iterated, a file that cannot be read any more, or a worker that dies, is a `UserError`.
    """
    return _loader(dataset, batch_size, workers, default_collate, sampler)


def validation_loader(dataset: ValidationSet, batch_size: int, workers: int) -> DataLoader:
    """Batches of `Validation` in the data set's order; errors as in `training_loader`."""
    return _loader(dataset, batch_size, workers, _collate)


def _loader(
    dataset: Dataset, batch_size: int, workers: int, collate: Callable[[list], Any], sampler: Sampler | None = None
) -> DataLoader:
    return _Loader(
        _ErrorsAsSamples(dataset),
        batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_interrupts_to_the_parent,
        collate_fn=partial(_unless_error, collate),
        # The loader's own draws come from here and leave the global generator, which dropout uses, alone.
        generator=torch.Generator().manual_seed(0),
    )


# A worker's exception reaches the trainer with the worker's traceback for its message. So a `UserError` crosses over as
# a value instead: sample → batch → raised where it is taken out of the loader.


class _ErrorsAsSamples(Dataset[Any]):
    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._dataset[index]
        except UserError as error:
            return error


def _unless_error(collate: Callable[[list], Any], samples: list) -> Any:
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    return errors[0] if errors else collate(samples)


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        problem = None
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    problem = batch
                    break
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            problem = UserError(
                f"a process that reads images died ({str(error).splitlines()[0]}). If memory ran out, lower "
                "--num-workers; in a container, enlarge /dev/shm"
            )
        if problem is not None:
            if self.num_workers > 0:
                # Left to the garbage collector, with a traceback around them, they are waited for in vain, 5 s each.
                batches._shutdown_workers()  # type: ignore[attr-defined]
                self._iterator = None
            raise problem


def _leave_interrupts_to_the_parent(_: int) -> None:
    # A terminal sends Ctrl-C to the whole group: every worker would print a traceback before the parent ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> Validation:
    return Validation(torch.stack([image for image, _ in samples]), [mask for _, mask in samples])


def _unit(image: torch.Tensor) -> torch.Tensor:
    return image.as_subclass(torch.Tensor).float().div_(255)
