"""Choose the average after the training: snapshots of a few averages, and any other average made from them.

    ema = FastEMA(model, decay_type="power", sigma_rel=[0.05, 0.10])
    snapshots = Snapshots("snapshots", ema, every=1000)
    ...                                # in the training loop, after each update: snapshots.save()
    model.load_state_dict(synthesize("snapshots", sigma_rel=0.15))

After Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2312.02696, section 3): an
average is a weighted sum of the weights at all steps, and so is every linear combination of averages. The combination
whose weights are closest to those wanted is found by least squares.
"""

from fastema.posthoc.profiles import Profile, constant_decay, power, uniform, weighted
from fastema.posthoc.snapshot_files import SnapshotError
from fastema.posthoc.snapshots import Snapshots
from fastema.posthoc.synthesis import Averaged, errors_of, snapshots_in, synthesize, synthesize_all

__all__ = [
    "Averaged",
    "Profile",
    "SnapshotError",
    "Snapshots",
    "constant_decay",
    "errors_of",
    "power",
    "snapshots_in",
    "synthesize",
    "synthesize_all",
    "uniform",
    "weighted",
]
