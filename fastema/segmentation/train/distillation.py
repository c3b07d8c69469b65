"""A teacher and what a student learns of it: for every pixel not only foreground or not, but how sure the teacher is.

The teacher is a network of its own beside the student's. Nothing that trains, averages or saves the student reaches it,
so it ends bit for bit as it began, and is in no checkpoint of the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastema.segmentation.data.listing import Pair
from fastema.segmentation.data.loaders import ValidationSet, validation_loader
from fastema.segmentation.errors import UserError
from fastema.segmentation.eval.evaluation import evaluate
from fastema.segmentation.model.load import load_net, read_checkpoint
from fastema.segmentation.model.network import Output, SegmentationNet
from fastema.segmentation.report.timers import Costs
from fastema.segmentation.train.losses import BALANCE_WEIGHT, training_loss
from fastema.segmentation.train.objective import Objective
from fastema.segmentation.train.precision import Precision


class Teacher(nn.Module):
    """A trained network that only answers: in evaluation mode, without gradients.

    Args:
        net: with its trained weights.
        img_size: the side of the squares that it was trained on, pixels; it is shown its images at this size.
        origin: which weights of which file, in words.
        val_fraction: the share of its data that its own training held out; None if that is not known.
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
        """What it says of images, float [N, 3, H, W] in [0, 1]: logits [N, 1, H, W], at the images' size."""
        size = images.shape[-2:]
        own = torch.Size((self.img_size, self.img_size))
        with torch.no_grad():
            if size == own:
                return self.net(images)
            output: Output = self.net(F.interpolate(images, own, mode="bilinear", align_corners=False, antialias=True))
            return output._replace(
                logits=F.interpolate(output.logits, size, mode="bilinear", align_corners=False, antialias=True)
            )


def load_teacher(path: Path, backbone: str | None = None) -> Teacher:
    """The network of a checkpoint of `fastema train`, on the CPU: its averaged weights where there are any.

    Args:
        path: the checkpoint; its options say how the network is built.
        backbone: what it is expected to have; a pretraining tag (`name.tag`) is not compared, the weights are the
            checkpoint's own.

    Raises:
        CheckpointError: the file cannot be read, or is not whole.
        UserError: no network can be built from it, or it has another backbone.
    """
    checkpoint = read_checkpoint(path)
    architecture = checkpoint.architecture
    if backbone is not None and backbone.partition(".")[0] != architecture.backbone.partition(".")[0]:
        raise UserError(
            f"--teacher-checkpoint {path} has the backbone {architecture.backbone}, not {backbone}: give the "
            "checkpoint that you mean, or leave out --teacher-backbone, which is only a check"
        )
    weights = checkpoint.weights[-1]
    net = load_net(checkpoint, torch.device("cpu"), weights)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    told = [f"{weights} of {path}", architecture.backbone]
    if architecture.num_experts:
        told.append(f"{architecture.num_experts} experts a level")
    if checkpoint.epoch is not None:
        told[0] += f" after epoch {checkpoint.epoch}"
    origin = f"{'; '.join(told)}; {parameters / 1e6:.1f} M parameters"
    val_fraction = checkpoint.options.get("val_fraction")
    return Teacher(net, checkpoint.img_size, origin, val_fraction if isinstance(val_fraction, float) else None)


@dataclass
class Distillation:
    """What a student is trained towards: the masks, and what its teacher says of the same augmented images.

        (1 - weight) · loss against the masks + weight · distance to the teacher + the experts' balance

    The balance keeps its full weight: it is no supervision, and a student with experts needs it from any teacher.

    Attributes:
        teacher: answers under the student's precision.
        weight: of the teacher, in [0, 1]; at 1 the masks are not used, at 0 the teacher is not.
        temperature: of `distillation_loss`.
        seconds: how long each batch was with the teacher so far.
    """

    teacher: Teacher
    weight: float
    temperature: float
    seconds: list[float] = field(default_factory=list)

    def make_objective(self, net: nn.Module, precision: Precision) -> Objective:
        """The objective of a run, for `Trainer`; moves the teacher to the run's device."""
        teacher = self.teacher.to(precision.device)
        costs = Costs(device=precision.device)

        def objective(images: Tensor, masks: Tensor) -> tuple[Tensor, Output]:
            # The teacher first: what it computes on the way is gone before the student's is kept for its backward.
            with costs.timed(self.seconds), precision.autocast():
                taught = teacher(images).logits
            with precision.autocast():
                output: Output = net(images)
            return self.loss(output, masks, taught), output

        return objective

    def loss(self, output: Output, masks: Tensor, taught: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            output: the student's.
            masks: [N, 1, H, W], float, 0 and 1.
            taught: the teacher's logits, [N, 1, H, W].
        """
        to_masks = training_loss(output, masks, balance_weight=0.0)
        to_teacher = distillation_loss(output.logits, taught, self.temperature)
        return (1 - self.weight) * to_masks + self.weight * to_teacher + BALANCE_WEIGHT * output.balance

    def cost(self, step_seconds: Sequence[float]) -> str:
        """What the teacher cost of a training whose optimizer steps took that long, in words."""
        if not self.seconds:
            return "it was not asked"
        share = sum(self.seconds) / sum(step_seconds)
        return f"{median(self.seconds) * 1e3:.1f} ms a batch (median), {share:.0%} of the training time"


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How far a student's probabilities are from its teacher's, both softened: the mean over images and pixels.

    Each pixel is a Bernoulli variable with the logit divided by the temperature; KL(teacher ‖ student), times the
    temperature squared, so that the gradient keeps its scale (Hinton, Vinyals, Dean, "Distilling the Knowledge in a
    Neural Network", 2015). Pixel by pixel as in Liu et al., "Structured Knowledge Distillation for Semantic
    Segmentation", CVPR 2019, with two classes. 0 where both agree.

    Args:
        student: logits, any shape.
        teacher: logits of the same shape; no gradient goes there.
        temperature: above 0; 1 compares the probabilities as they are, a large one the logits themselves.
    """
    ours, theirs = student / temperature, teacher.detach() / temperature
    # p·log(p/q) + (1-p)·log((1-p)/(1-q)) without a logarithm of a probability, which may be 0 in float32.
    divergence = F.softplus(ours) - F.softplus(theirs) - theirs.sigmoid() * (ours - theirs)
    return temperature**2 * divergence.mean()


def mean_iou(teacher: Teacher, validation: Sequence[Pair], size: int, workers: int, device: torch.device) -> float:
    """The IoU of a teacher on validation images, shown as it is shown the student's.

    Args:
        teacher: on `device`.
        validation: the images.
        size: of the student's images, pixels.
        workers: processes that read them.
        device: where to compute.
    """
    return fmean(evaluate(teacher, validation_loader(ValidationSet(validation, size), 8, workers), device))
