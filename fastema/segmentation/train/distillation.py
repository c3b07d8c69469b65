"""Distillation: train a student towards the masks and towards a teacher's probabilities.

The teacher is a network of its own. Nothing that trains, averages or saves the student reaches it, so it ends bit for
bit as it began, and is in no checkpoint of the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastema.errors import UserError
from fastema.segmentation.console import say
from fastema.segmentation.data.listing import Pair
from fastema.segmentation.data.loaders import ValidationSet, validation_loader
from fastema.segmentation.devices import CPU, Precision
from fastema.segmentation.eval.scores import evaluate
from fastema.segmentation.model.load import load_net, read_checkpoint
from fastema.segmentation.model.network import Output, SegmentationNet
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.report.timers import Timers
from fastema.segmentation.train.losses import BALANCE_WEIGHT, Objective, training_loss


class Teacher(nn.Module):
    """A trained network in evaluation mode, without gradients.

    Args:
        net: with its trained weights.
        img_size: side of its square images, pixels; it gets images resized to this.
        origin: its weights and their file, in words.
        val_fraction: share of its data that its training held out; None if unknown.
    """

    def __init__(
        self, net: SegmentationNet, img_size: int, origin: str = "given", val_fraction: float | None = None
    ) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.img_size = img_size
        self.origin = origin
        self.val_fraction = val_fraction
        self.eval()

    def forward(self, images: Tensor) -> Output:
        """Map images, float [N, 3, H, W] in [0, 1], to logits [N, 1, H, W] at the images' size."""
        with torch.no_grad():
            output: Output = self.net(_resized(images, torch.Size((self.img_size, self.img_size))))
            return output._replace(logits=_resized(output.logits, images.shape[-2:]))


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=True)


def load_teacher(path: Path, backbone: str | None = None) -> Teacher:
    """Load the network of a checkpoint of `fastema train` on the CPU, with averaged weights if it has any.

    Args:
        path: the checkpoint.
        backbone: the expected one, without regard to a pretraining tag (`name.tag`).
    """
    checkpoint = read_checkpoint(path)
    architecture, weights = checkpoint.architecture, checkpoint.weights[-1]
    if backbone is not None and backbone.partition(".")[0] != architecture.backbone.partition(".")[0]:
        raise UserError(
            f"--teacher-checkpoint {path} has the backbone {architecture.backbone}, not {backbone}: give the "
            "checkpoint that you mean, or leave out --teacher-backbone, which is only a check"
        )
    net = load_net(checkpoint, CPU, weights)
    epoch = "" if checkpoint.epoch is None else f" after epoch {checkpoint.epoch}"
    experts = f"{architecture.num_experts} experts a level; " if architecture.num_experts else ""
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    origin = f"{weights} of {path}{epoch}; {architecture.backbone}; {experts}{millions:.1f} M parameters"
    return Teacher(net, checkpoint.img_size, origin, checkpoint.options.get("val_fraction"))


@dataclass
class Distillation:
    """The objective of a student:

        (1 - weight) · loss against the masks + weight · distance to the teacher + the experts' balance

    The balance is no supervision, so it keeps its full weight.

    Attributes:
        teacher: runs in the student's precision.
        weight: of the teacher, in [0, 1].
        temperature: of `distillation_loss`.
        seconds: time with the teacher, per batch so far.
    """

    teacher: Teacher
    weight: float
    temperature: float
    seconds: list[float] = field(default_factory=list)

    def make_objective(self, net: nn.Module, precision: Precision) -> Objective:
        """Return the objective of a run; moves the teacher to the run's device."""
        teacher = self.teacher.to(precision.device)
        timers = Timers(device=precision.device)

        def objective(images: Tensor, masks: Tensor) -> tuple[Tensor, Output]:
            # The teacher first, so that its activations are gone before the student's are kept for backward.
            with timers.timed(self.seconds), precision.autocast():
                taught = teacher(images).logits
            with precision.autocast():
                output: Output = net(images)
            return self.loss(output, masks, taught), output

        return objective

    def announce(
        self, options: TrainOptions, validation: Sequence[Pair], device: torch.device, console: Console
    ) -> None:
        """Print how good the teacher, on its device, is on the validation images."""
        teacher = self.teacher
        score = mean_iou(teacher, validation, options.img_size, options.num_workers, device)
        say(console, f"Teacher: IoU {score:.4f} ({teacher.origin})")
        if teacher.img_size != options.img_size:
            say(console, f"Teacher: gets the images of {options.img_size} pixels resized to its {teacher.img_size}")
        if teacher.val_fraction is not None and teacher.val_fraction < options.val_fraction:
            say(
                console,
                f"Teacher: it held out {teacher.val_fraction:.0%} of its images, this run {options.val_fraction:.0%}: "
                "if they are the same images, it was trained on some that are validated on here, and so is better on "
                "them than on new ones",
            )

    def loss(self, output: Output, masks: Tensor, taught: Tensor) -> Tensor:
        """Return the mean loss of a batch: student's output, masks of 0 and 1, teacher's logits, each [N, 1, H, W]."""
        to_masks = training_loss(output, masks, balance_weight=0.0)
        to_teacher = distillation_loss(output.logits, taught, self.temperature)
        return (1 - self.weight) * to_masks + self.weight * to_teacher + BALANCE_WEIGHT * output.balance

    def cost(self, step_seconds: Sequence[float]) -> str:
        """Describe what the teacher cost of a training with these optimizer steps."""
        if not self.seconds:
            return "it did not run"
        share = sum(self.seconds) / sum(step_seconds)
        return f"{median(self.seconds) * 1e3:.1f} ms a batch (median), {share:.0%} of the training time"


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher ‖ student) of softened probabilities, averaged over images and pixels.

    Each pixel is a Bernoulli variable with its logit divided by the temperature. The factor temperature² keeps the
    gradient's scale (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015). Pixel by pixel as in
    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019.

    Args:
        student: logits, any shape.
        teacher: logits of the same shape; they get no gradient.
        temperature: above 0; 1 compares the probabilities themselves, a large one the logits.
    """
    ours, theirs = student / temperature, teacher.detach() / temperature
    # p·log(p/q) + (1-p)·log((1-p)/(1-q)), without the logarithm of a probability that may be 0 in float32.
    divergence = F.softplus(ours) - F.softplus(theirs) - theirs.sigmoid() * (ours - theirs)
    return temperature**2 * divergence.mean()


def mean_iou(teacher: Teacher, validation: Sequence[Pair], size: int, workers: int, device: torch.device) -> float:
    """Return a teacher's mean IoU on validation images of the student's size, pixels."""
    return fmean(evaluate(teacher, validation_loader(ValidationSet(validation, size), 8, workers), device))
