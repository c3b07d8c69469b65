"""Other libraries' averages, each as a class of one shape: `update(model, k)`, `file()`, `averages(model)`.

A peer whose package is not installed skips. Where a package cannot be installed here, `Rewritten` computes its formula
and writes its file, after its source.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn


def package(name: str) -> Any:
    """Import a module of a peer, or skip."""
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed")


def file_of_package(name: str, path: str) -> Any:
    """Import one file of a package without the package's own imports, or skip."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    file = importlib.util.spec_from_file_location(f"{name}_{Path(path).stem}", Path(spec.origin).parent / path)
    assert file is not None and file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module


class Peer:
    """A library's average of a model.

    Attributes:
        ours: arguments of the FastEMA that goes on as it does.
        source: what `import_average` should say.
        tolerance: largest difference after 200 steps, relative to a tensor's largest value.
        step: passed to `import_average`, where the file has no count.
    """

    source: ClassVar[str]
    ours: ClassVar[dict[str, Any]]
    tolerance: ClassVar[float] = 2e-6
    step: ClassVar[int | None] = None

    def __init__(self, model: nn.Module) -> None:
        raise NotImplementedError

    def update(self, model: nn.Module, k: int) -> None:
        """Average after optimizer step `k`, from 1."""
        raise NotImplementedError

    def file(self, model: nn.Module) -> dict[str, Any]:
        """Return what its checkpoint holds."""
        raise NotImplementedError

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the averages under the model's names."""
        raise NotImplementedError

    def ours_at(self, k: int) -> int | None:
        """Return the step that FastEMA is told after optimizer step `k`; None: none."""
        return None


# ---- torch ----


class Torch(Peer):
    source = "torch"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "constant", "buffers": "average"}
    tolerance = 1e-6
    use_buffers: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        from torch.optim.swa_utils import AveragedModel

        self.averaged = AveragedModel(model, multi_avg_fn=self.function(), use_buffers=self.use_buffers)

    def function(self) -> Any:
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        return get_ema_multi_avg_fn(0.99)

    def update(self, model: nn.Module, k: int) -> None:
        self.averaged.update_parameters(model)

    def file(self, model: nn.Module) -> dict[str, Any]:
        return self.averaged.state_dict()

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.averaged.module.state_dict() if self.use_buffers else _parameters(self.averaged.module)


class TorchEqual(Torch):
    """With use_buffers=True torch raises on num_batches_tracked."""

    ours: ClassVar[dict[str, Any]] = {"decay_type": "power", "gamma": 0}
    use_buffers = False

    def function(self) -> Any:
        from torch.optim.swa_utils import get_swa_multi_avg_fn

        return get_swa_multi_avg_fn()


class TorchInACheckpoint(Torch):
    def file(self, model: nn.Module) -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": {"state": {}}, "model_ema": self.averaged.state_dict()}


class Lightning(Peer):
    """Its callback's own hooks, on a module that holds the model as `net`."""

    source = "lightning"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "constant", "buffers": "average"}

    def __init__(self, model: nn.Module) -> None:
        lightning = package("lightning.pytorch")
        self.module, self.trainer = lightning.LightningModule(), _Namespace(global_step=0)
        self.module.net = model
        self.callback = lightning.callbacks.EMAWeightAveraging(decay=0.99)
        self.callback.setup(self.trainer, self.module, "fit")

    def update(self, model: nn.Module, k: int) -> None:
        self.trainer.global_step = k
        self.callback.on_train_batch_end(self.trainer, self.module, None, None, k - 1)

    def file(self, model: nn.Module) -> dict[str, Any]:
        checkpoint = {"state_dict": dict(self.module.state_dict()), "global_step": self.trainer.global_step}
        self.callback.on_save_checkpoint(self.trainer, self.module, checkpoint)
        return checkpoint

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.callback._average_model.module.net.state_dict()


# ---- timm ----


class Timm(Peer):
    source = "timm"
    step = 100
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "constant", "buffers": "average"}
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module) -> None:
        self.ema = package("timm.utils").ModelEmaV3(model, decay=0.99, **self.options)

    def update(self, model: nn.Module, k: int) -> None:
        self.ema.update(model, step=k)

    def file(self, model: nn.Module) -> dict[str, Any]:
        saved = package("timm.utils").get_state_dict(self.ema)
        return {"epoch": 1, "arch": "net", "state_dict": model.state_dict(), "state_dict_ema": saved, "version": 2}

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.ema.module.state_dict()


class TimmWarmup(Timm):
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "warmup", "buffers": "average"}
    options: ClassVar[dict[str, Any]] = {"use_warmup": True}


# ---- lists without names ----


class Diffusers(Peer):
    source = "diffusers"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "threshold"}
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module) -> None:
        self.ema = package("diffusers.training_utils").EMAModel(model.parameters(), decay=0.99, **self.options)

    def update(self, model: nn.Module, k: int) -> None:
        self.ema.step(model.parameters())

    def file(self, model: nn.Module) -> dict[str, Any]:
        return self.ema.state_dict()

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        names = [name for name, _ in model.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))


class DiffusersWarmup(Diffusers):
    ours: ClassVar[dict[str, Any]] = {
        "decay": 0.99,
        "decay_type": "warmup",
        "inv_gamma": 2.0,
        "power": 0.75,
        "update_after_step": 7,
    }
    options: ClassVar[dict[str, Any]] = {
        "use_ema_warmup": True,
        "inv_gamma": 2.0,
        "power": 0.75,
        "update_after_step": 7,
    }


class DiffusersLater(Diffusers):
    options: ClassVar[dict[str, Any]] = {"update_after_step": 30}


class TorchEma(Peer):
    source = "torch-ema"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "threshold"}
    counts: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        ema = package("torch_ema").ExponentialMovingAverage
        self.ema = ema(model.parameters(), decay=0.99, use_num_updates=self.counts)

    def update(self, model: nn.Module, k: int) -> None:
        self.ema.update(model.parameters())

    def file(self, model: nn.Module) -> dict[str, Any]:
        # As torch-ngp saves it.
        return {"epoch": 1, "global_step": 100, "model": model.state_dict(), "ema": self.ema.state_dict()}

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        names = [name for name, _ in model.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))


class TorchEmaConstant(TorchEma):
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "constant"}
    counts = False
    step = 100


# ---- ema-pytorch ----


class EmaPytorch(Peer):
    source = "ema-pytorch"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "warmup", "buffers": "average"}
    options: ClassVar[dict[str, Any]] = {"update_every": 1, "update_after_step": 0}

    def __init__(self, model: nn.Module) -> None:
        self.ema = package("ema_pytorch").EMA(model, beta=0.99, **self.options)

    def update(self, model: nn.Module, k: int) -> None:
        self.ema.update()

    def file(self, model: nn.Module) -> dict[str, Any]:
        return {"step": 100, "ema": self.ema.state_dict()}

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.ema.ema_model.state_dict()


class EmaPytorchDefaults(EmaPytorch):
    """Its own update_every=10: one step less, and `update(step=k - 1)`."""

    step = 99
    ours: ClassVar[dict[str, Any]] = {
        "decay": 0.99,
        "decay_type": "warmup",
        "buffers": "average",
        "update_every": 10,
        "update_after_step": 19,
    }
    options: ClassVar[dict[str, Any]] = {"update_every": 10, "update_after_step": 20}

    def ours_at(self, k: int) -> int | None:
        return k - 1


# ---- trainers ----


class MMEngine(Peer):
    source = "mmengine"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "constant", "buffers": "copy"}
    kind: ClassVar[str] = "ExponentialMovingAverage"
    options: ClassVar[dict[str, Any]] = {"momentum": 0.01}

    def __init__(self, model: nn.Module) -> None:
        module = package("mmengine.model.averaged_model")
        self.hook = package("mmengine.hooks").EMAHook()
        self.hook.ema_model = self.averaged = getattr(module, self.kind)(model, **self.options)

    def update(self, model: nn.Module, k: int) -> None:
        self.averaged.update_parameters(model)

    def file(self, model: nn.Module) -> dict[str, Any]:
        checkpoint = {"state_dict": dict(model.state_dict())}
        self.hook.before_save_checkpoint(None, checkpoint)
        return checkpoint

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.averaged.module.state_dict()


class MMEngineAnnealing(MMEngine):
    kind = "MomentumAnnealingEMA"
    options: ClassVar[dict[str, Any]] = {"momentum": 0.01, "gamma": 50}
    ours: ClassVar[dict[str, Any]] = {
        "decay": 0.99,
        "decay_type": "warmup",
        "inv_gamma": 50,
        "power": 1,
        "buffers": "copy",
    }


class MMEngineEqual(MMEngine):
    kind = "StochasticWeightAverage"
    options: ClassVar[dict[str, Any]] = {}
    ours: ClassVar[dict[str, Any]] = {"decay_type": "power", "gamma": 0, "buffers": "copy"}


class Ignite(Peer):
    source = "ignite"
    step = 100
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "constant", "buffers": "copy"}

    def __init__(self, model: nn.Module) -> None:
        handlers, engine = package("ignite.handlers"), package("ignite.engine")
        self.model, self.handler = model, handlers.EMAHandler(model, momentum=0.01)
        self.engine = engine.Engine(lambda engine, batch: None)
        self.handler.attach(self.engine)

    def update(self, model: nn.Module, k: int) -> None:
        self.engine.run([0], max_epochs=k)

    def file(self, model: nn.Module) -> dict[str, Any]:
        return {"model": model.state_dict(), "ema_model": copy.deepcopy(self.handler.ema_model.state_dict())}

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.handler.ema_model.state_dict()


class Composer(Peer):
    """Its checkpoints are written while the average is in the model."""

    source = "composer"
    step = 100
    ours: ClassVar[dict[str, Any]] = {"decay_type": "half_life", "half_life": 50, "buffers": "average"}
    active: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.module = package("composer.algorithms.ema.ema")
        self.algorithm = self.module.EMA(half_life="50ba")
        self.algorithm.ema_model = self.module.EMAParameters(model)
        self.algorithm.ema_started = True

    def update(self, model: nn.Module, k: int) -> None:
        self.module.compute_ema(model, self.algorithm.ema_model, smoothing=self.algorithm.smoothing)

    def file(self, model: nn.Module) -> dict[str, Any]:
        if self.active:
            self.algorithm.ema_model.swap_params(model)
            self.algorithm.ema_weights_active = True
        saved = {"model": model.state_dict(), "algorithms": [("EMA", self.algorithm.state_dict())]}
        saved = copy.deepcopy({"state": saved})
        if self.active:
            self.algorithm.ema_model.swap_params(model)
            self.algorithm.ema_weights_active = False
        return saved

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        held = self.algorithm.ema_model
        return {**held.named_parameters_dict, **held.named_buffers_dict}


class ComposerInactive(Composer):
    active = False


class Ultralytics(Peer):
    source = "ultralytics"
    tolerance = 2e-3  # its files hold 16 bits
    ours: ClassVar[dict[str, Any]] = {
        "decay": 0.99,
        "decay_type": "exp",
        "total_steps": 200,
        "beta": 200 / 50,
        "buffers": "average",
    }

    def __init__(self, model: nn.Module) -> None:
        self.ema = package("ultralytics.utils.torch_utils").ModelEMA(model, decay=0.99, tau=50)

    def update(self, model: nn.Module, k: int) -> None:
        self.ema.update(model)

    def file(self, model: nn.Module) -> dict[str, Any]:
        # What the two lines of the error write; the checkpoint itself holds the module.
        return {"ema": copy.deepcopy(self.ema.ema).half().float().state_dict(), "updates": self.ema.updates}

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.ema.ema.state_dict()


class KDiffusion(Peer):
    source = "k-diffusion"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "warmup", "power": 0.75, "buffers": "copy"}

    def __init__(self, model: nn.Module) -> None:
        self.module = file_of_package("k_diffusion", "utils.py")
        self.averaged, self.schedule = copy.deepcopy(model), self.module.EMAWarmup(power=0.75, max_value=0.99)

    def update(self, model: nn.Module, k: int) -> None:
        self.module.ema_update(model, self.averaged, self.schedule.get_value())
        self.schedule.step()

    def file(self, model: nn.Module) -> dict[str, Any]:
        # As its train.py saves it.
        averaged, schedule = self.averaged.state_dict(), self.schedule.state_dict()
        return {"config": {}, "model": model.state_dict(), "model_ema": averaged, "ema_sched": schedule, "step": 100}

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.averaged.state_dict()


class Boltz(Peer):
    source = "boltz"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "threshold", "buffers": "average"}

    def __init__(self, model: nn.Module) -> None:
        self.callback = package("boltz.model.optim.ema").EMA(decay=0.99, warm_start=True)
        self.trainer, self.module = _Namespace(global_step=0), model
        model.device = torch.device("cpu")  # type: ignore[assignment]
        self.callback.on_train_start(self.trainer, model)

    def update(self, model: nn.Module, k: int) -> None:
        self.trainer.global_step = k
        self.callback.on_train_batch_end(self.trainer, model, None, None, 0)

    def file(self, model: nn.Module) -> dict[str, Any]:
        checkpoint = {"state_dict": model.state_dict(), "global_step": 100}
        self.callback.on_save_checkpoint(self.trainer, model, checkpoint)
        return checkpoint

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.callback._ema_weights


class _Namespace:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


# ---- written after the source ----


class Rewritten(Peer):
    """A formula over the tensors of a state; `decay(k)` is that of update k."""

    decay: ClassVar[Callable[[int], float]]
    names: ClassVar[Callable[[nn.Module], dict[str, Tensor]]] = staticmethod(lambda model: model.state_dict())

    def __init__(self, model: nn.Module) -> None:
        self.held = {name: tensor.detach().clone() for name, tensor in type(self).names(model).items()}
        self.count = 0

    def update(self, model: nn.Module, k: int) -> None:
        self.count = k
        for name, tensor in type(self).names(model).items():
            if tensor.is_floating_point():
                self.held[name].lerp_(tensor.detach(), 1 - type(self).decay(k))

    def averages(self, model: nn.Module) -> dict[str, Tensor]:
        return self.held


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


class LitEma(Rewritten):
    """Stability-AI/generative-models, sgm/modules/ema.py: names without dots beside the module's own."""

    source = "litema"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "threshold", "buffers": "copy"}
    decay = staticmethod(lambda k: min(0.99, (1 + k) / (10 + k)))
    names = staticmethod(_parameters)

    def file(self, model: nn.Module) -> dict[str, Any]:
        state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        state |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in self.held.items()}
        state |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(self.count)}
        return {"state_dict": state, "global_step": 100}


class D2Go(Rewritten):
    """facebookresearch/d2go, d2go/modeling/ema.py: parameters and buffers, no count."""

    source = "d2go"
    step = 100
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "constant", "buffers": "average"}
    decay = staticmethod(lambda k: 0.99)

    def file(self, model: nn.Module) -> dict[str, Any]:
        return {"model": model.state_dict(), "ema_state": self.held, "iteration": 99}


class Detr(Rewritten):
    """lyuwenyu/RT-DETR and Peterande/D-FINE, src/optim/ema.py."""

    source = "detr"
    ours: ClassVar[dict[str, Any]] = {
        "decay": 0.99,
        "decay_type": "exp",
        "total_steps": 200,
        "beta": 200 / 40,
        "buffers": "average",
    }
    decay = staticmethod(lambda k: 0.99 * (1 - math.exp(-k / 40)))

    def file(self, model: nn.Module) -> dict[str, Any]:
        return {"model": model.state_dict(), "ema": {"module": self.held, "updates": self.count}, "last_epoch": 3}


class SuperGradients(Rewritten):
    """Deci-AI/super-gradients: `net` and `ema_net`, no count."""

    source = "super-gradients"
    step = 100
    ours: ClassVar[dict[str, Any]] = {
        "decay": 0.99,
        "decay_type": "exp",
        "total_steps": 200,
        "beta": 15,
        "buffers": "average",
    }
    decay = staticmethod(lambda k: 0.99 * (1 - math.exp(-15 * k / 200)))

    def file(self, model: nn.Module) -> dict[str, Any]:
        return {"net": model.state_dict(), "ema_net": self.held, "epoch": 3}


class Edm2(Rewritten):
    """NVlabs/edm2, training/phema.py: two widths, the buffers those of the start, no count."""

    source = "edm2"
    step = 100
    ours: ClassVar[dict[str, Any]] = {"decay_type": "power", "sigma_rel": 0.1, "buffers": "copy"}
    decay = staticmethod(lambda k: (1 - 1 / k) ** (6.937 + 1))
    tolerance = 2e-4  # the exponent above has four digits
    names = staticmethod(_parameters)

    def file(self, model: nn.Module) -> dict[str, Any]:
        buffers = dict(model.named_buffers())
        other = {name: torch.zeros_like(tensor) for name, tensor in self.held.items()}
        return {"stds": [0.05, 0.1], "emas": [{**other, **buffers}, {**self.held, **buffers}]}


class Callback(Rewritten):
    """A callback that puts `ema_state_dict` into a Lightning checkpoint."""

    source = "callback"
    ours: ClassVar[dict[str, Any]] = {"decay": 0.99, "decay_type": "constant", "buffers": "average"}
    decay = staticmethod(lambda k: 0.99)

    def file(self, model: nn.Module) -> dict[str, Any]:
        return {"state_dict": model.state_dict(), "ema_state_dict": self.held, "global_step": 100, "epoch": 2}


PEERS: tuple[type[Peer], ...] = (
    *(Torch, TorchEqual, TorchInACheckpoint, Lightning, Timm, TimmWarmup, Diffusers, DiffusersWarmup, DiffusersLater),
    *(TorchEma, TorchEmaConstant, EmaPytorch, EmaPytorchDefaults, MMEngine, MMEngineAnnealing, MMEngineEqual),
    *(Ignite, Composer, ComposerInactive, Ultralytics, KDiffusion, Boltz),
    *(LitEma, D2Go, Detr, SuperGradients, Edm2, Callback),
)
