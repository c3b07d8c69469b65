"""Generate a camouflage data set: objects that differ from their background only in the direction of their texture.

Object and background are the same random texture, stretched in different directions. Inside and outside, the values are
replaced by their ranks, so both have the same histogram: no threshold, colour or brightness finds the object.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# Part of the folder's name: raise it when the images change.
_VERSION = 2

IMAGE_COUNT, IMAGE_SIZE = 480, 128

# Test has a quarter as many images as Train, from other seeds.
_TEST_SHARE = 4


def ensure_dataset(parent: Path, seed: int, count: int = IMAGE_COUNT, size: int = IMAGE_SIZE) -> Path:
    """Return the folder of the generated data set in `parent`; generate it if it is not there.

    It has COD10K's layout: Train with `count` images of `size` pixels, and Test. It gets its name only when it is
    complete, so an interrupted run leaves nothing that looks like a data set.
    """
    folder = parent / f"synthetic-v{_VERSION}-{count}x{size}-seed{seed}"
    if folder.is_dir():
        return folder
    partial = parent / f".{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    tests = max(1, count // _TEST_SHARE)
    try:
        _write_split(partial / "Train", "synthetic", [[seed, index] for index in range(count)], size)
        _write_split(partial / "Test", "synthetic-test", [[seed, index, 1] for index in range(tests)], size)
        try:
            partial.rename(folder)
        except OSError:
            # Another process of the same run was faster; its images are the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_split(folder: Path, name: str, seeds: Sequence[Sequence[int]], size: int) -> None:
    images, masks = folder / "Image", folder / "GT_Object"
    images.mkdir(parents=True)
    masks.mkdir()
    for index, seed in enumerate(seeds):
        image, mask = camouflaged_pair(np.random.default_rng(seed), size)
        Image.fromarray(image).save(images / f"{name}-{index:04d}.jpg", quality=95, subsampling=0)
        Image.fromarray(mask * np.uint8(255)).save(masks / f"{name}-{index:04d}.png")


def camouflaged_pair(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one image, uint8 [size, size, 3], and its mask, uint8 [size, size] of 0 and 1."""
    mask = _blob(rng, size)
    direction = rng.uniform(0, np.pi)
    turned = direction + rng.choice([-1, 1]) * rng.uniform(np.pi / 6, np.pi / 2)
    wavelength = rng.uniform(5, 11)
    background = _directed_texture(rng, size, direction, wavelength)
    foreground = _directed_texture(rng, size, turned, wavelength)
    values = np.empty((size, size))
    values[mask] = _ranks(foreground[mask])
    values[~mask] = _ranks(background[~mask])
    colours = _palette(rng)
    image = np.stack([np.interp(values, np.linspace(0, 1, len(colours)), channel) for channel in colours.T], axis=-1)
    # Uneven light over object and background alike.
    image *= 1 + 0.25 * _smooth_noise(rng, size, scale=size / 2)[..., None]
    image += rng.normal(0, 6, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), mask.astype(np.uint8)


def _blob(rng: np.random.Generator, size: int) -> np.ndarray:  # bool [size, size]
    """Return a smooth, star-shaped object of 6 to 25 % of the image."""
    centre = rng.uniform(0.3, 0.7, 2) * size
    y, x = np.mgrid[:size, :size] + 0.5
    angle = np.arctan2(y - centre[0], x - centre[1])
    radius = np.ones_like(angle)
    for wave in range(1, 6):
        radius += rng.uniform(-0.35, 0.35) / wave * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    wanted = rng.uniform(0.06, 0.25) * size * size
    # Star-shaped: the scale that gives the wanted area is a quantile of the relative distance.
    relative = np.hypot(y - centre[0], x - centre[1]) / np.maximum(radius, 0.25)
    return relative <= np.partition(relative.ravel(), int(wanted))[int(wanted)]


def _directed_texture(rng: np.random.Generator, size: int, direction: float, wavelength: float) -> np.ndarray:
    """Return noise whose spectrum is a soft ring (the wavelength), stronger along one direction."""
    frequency_y, frequency_x = np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :]
    frequency = np.hypot(frequency_y, frequency_x)
    ring = np.exp(-(((frequency - 1 / wavelength) / 0.04) ** 2))
    directed = np.exp(2.0 * np.cos(2 * (np.arctan2(frequency_y, frequency_x) - direction)))
    return np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * ring * directed).real


def _smooth_noise(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """Return noise in [-1, 1] that varies over about `scale` pixels."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :])
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * np.exp(-((frequency * scale) ** 2))).real
    return noise / np.abs(noise).max()


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return each value's rank, scaled to [0, 1], which makes the histogram flat."""
    return np.argsort(np.argsort(values)) / max(1, len(values) - 1)


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Return three related colours, [dark to light, RGB]."""
    base = rng.uniform(90, 160) + rng.normal(0, 22, 3)
    return np.clip(np.outer([0.45, 1.0, 1.5], base) + rng.normal(0, 12, (3, 3)), 0, 255)
