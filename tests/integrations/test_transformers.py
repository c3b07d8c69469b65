"""`FastEMATrainerCallback` in the real Hugging Face Trainer, on the CPU, with models of a few weights."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import AliveBytes
from cases.callbacks import CONSTANT, assert_average, assert_same, average
from fastema import FastEMA, SwapError

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

import safetensors.torch
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastema.integrations import transformers as ours
from fastema.integrations.transformers import FastEMATrainerCallback
from fastema.integrations.transformers_checkpoint import read_average, write_average

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A BatchNorm net with an output as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.evaluated: list[dict[str, Tensor]] = []
        self.fail_with: type[BaseException] | None = None

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not self.training:
            self.evaluated.append(snapshot(self))
            if self.fail_with is not None:
                raise self.fail_with("stop")
        logits = self.head(self.second(self.norm(self.first(x)).relu()))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Data(torch.utils.data.Dataset[Any]):
    def __init__(self, seed: int = 7, count: int = 20) -> None:
        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "labels": int(self.x[index].sum() > 0)}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Recording(torch.optim.SGD):
    """A callback that records the weights after each real step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net.parameters(), lr=0.1, momentum=0.9)
        self.after_steps: list[dict[str, Tensor]] = []
        self.register_step_post_hook(lambda *_: self.after_steps.append(snapshot(net)))


def build(folder: Path, net: nn.Module | None = None, **args: Any) -> tuple[Trainer, Recording]:
    net = net or Net()
    optimizer = Recording(net)
    callbacks = args.pop("callbacks", [])
    trainer_class = args.pop("trainer_class", Trainer)
    eval_dataset = args.pop("eval_dataset", Data(8))
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 7,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }
    trainer = trainer_class(
        model=net,
        args=TrainingArguments(**{**given, **args}),
        train_dataset=Data(),
        eval_dataset=eval_dataset,
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    return trainer, optimizer


def loss_with(weights: dict[str, Tensor], data: Data) -> float:
    net = Net().eval()
    net.load_state_dict(weights)
    with torch.no_grad():
        return net(data.x, (data.x.sum(1) > 0).long())["loss"].item()


# ---- updates ----


def test_one_update_per_optimizer_step(tmp_path: Path) -> None:
    trainer, optimizer = build(tmp_path, gradient_accumulation_steps=2)
    first = snapshot(trainer.model)
    callback = FastEMATrainerCallback(**CONSTANT).attach(trainer)
    trainer.train()
    # 5 batches in groups of 2: the short last one steps too. 2 epochs.
    assert len(optimizer.after_steps) == 6
    assert callback.ema is not None and callback.ema.num_updates == 6
    assert_average(callback.ema_state_dict(), average(first, optimizer.after_steps))
    assert_same(snapshot(trainer.model), optimizer.after_steps[-1])
    # After the training, the optimizer's steps are none of the callback's business.
    optimizer.step()
    assert callback.ema.num_updates == 6


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_gradient_scaler_skips_are_not_averaged(tmp_path: Path, fused: bool) -> None:
    class Overflows(Net):
        calls = 0

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            output = super().forward(x, labels)
            self.calls += 1
            return {**output, "loss": output["loss"] * (float("inf") if self.calls == 3 else 1.0)}

    net = Overflows()
    trainer, _ = build(tmp_path, net, num_train_epochs=1, max_grad_norm=0)
    trainer.optimizer = torch.optim.Adam(net.parameters(), lr=0.01, fused=fused)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)  # what fp16=True sets on a GPU
    callback = FastEMATrainerCallback(**CONSTANT).attach(trainer)
    trainer.train()
    assert net.calls == 5
    assert all(bool(value.isfinite().all()) for value in net.state_dict().values())
    assert callback.ema is not None and callback.ema.num_updates == 4


@pytest.mark.parametrize(
    ("start", "skipped"), [({"start_step": 3}, 3), ({"start_epoch": 1}, 5), ({"start_epoch": 1, "start_step": 7}, 7)]
)
def test_start_is_a_threshold(tmp_path: Path, start: dict[str, Any], skipped: int) -> None:
    trainer, optimizer = build(tmp_path)
    callback = FastEMATrainerCallback(**CONSTANT, **start).attach(trainer)
    trainer.train()
    assert callback.ema is not None and callback.ema.num_updates == 10 - skipped
    steps = optimizer.after_steps
    assert_average(callback.ema_state_dict(), average(steps[skipped - 1], steps[skipped:]))


# ---- evaluation ----


def test_both_are_evaluated_side_by_side(tmp_path: Path) -> None:
    class Seen(TrainerCallback):
        def __init__(self) -> None:
            self.metrics: list[dict[str, float]] = []
            self.logs: list[dict[str, float]] = []

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.metrics.append(dict(kwargs["metrics"]))

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.logs.append(dict(kwargs["logs"]))

    seen = Seen()
    trainer, optimizer = build(tmp_path, eval_strategy="epoch", callbacks=[seen])
    callback = FastEMATrainerCallback(**CONSTANT).attach(trainer)
    trainer.train()
    assert len(seen.metrics) == 2
    base, ema = loss_with(snapshot(trainer.model), Data(8)), loss_with(callback.ema_state_dict(), Data(8))
    assert base != pytest.approx(ema, rel=1e-4)
    assert seen.metrics[-1]["eval_loss"] == pytest.approx(base, rel=1e-5)
    assert seen.metrics[-1]["eval_ema_loss"] == pytest.approx(ema, rel=1e-5)
    assert [log["eval_ema_loss"] for log in seen.logs if "eval_ema_loss" in log] == [
        metrics["eval_ema_loss"] for metrics in seen.metrics
    ]
    after = trainer.evaluate()
    assert (after["eval_loss"], after["eval_ema_loss"]) == (
        pytest.approx(base, rel=1e-5),
        pytest.approx(ema, rel=1e-5),
    )
    assert_same(snapshot(trainer.model), optimizer.after_steps[-1])


def test_several_data_sets(tmp_path: Path) -> None:
    sets = {"one": Data(8), "other_one": Data(9)}
    trainer, _ = build(tmp_path, eval_dataset=sets, num_train_epochs=1)
    callback = FastEMATrainerCallback(**CONSTANT).attach(trainer)
    trainer.train()
    for metrics in (trainer.evaluate(), trainer.evaluate(sets)):
        for name, data in sets.items():
            ema = loss_with(callback.ema_state_dict(), data)
            assert metrics[f"eval_{name}_loss"] == pytest.approx(loss_with(snapshot(trainer.model), data), rel=1e-5)
            assert metrics[f"eval_ema_{name}_loss"] == pytest.approx(ema, rel=1e-5)
        assert len([key for key in metrics if key.endswith("_loss")]) == 4


def test_before_the_start_both_are_the_same_and_early_stopping_works(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer, _ = build(
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="eval_ema_loss",
        greater_is_better=True,  # a loss that should rise: it never does for long, so that training is stopped
        load_best_model_at_end=True,
        num_train_epochs=9,
        callbacks=[stopping],
    )
    seen: list[tuple[float, float]] = []

    class Seen(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((kwargs["metrics"]["eval_loss"], kwargs["metrics"]["eval_ema_loss"]))

    trainer.add_callback(Seen())
    FastEMATrainerCallback(**CONSTANT, start_epoch=2).attach(trainer)
    trainer.train()
    assert [base == ema for base, ema in seen] == [True, True, *[False] * (len(seen) - 2)]
    losses = [ema for _, ema in seen]
    best = losses.index(max(losses))
    assert len(losses) == best + 3 < 9  # stopped two evaluations after the best one


def test_training_goes_on_bit_for_bit_as_without_the_callback(tmp_path: Path) -> None:
    class Noisy(Net):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return super().forward(x + 0.1 * torch.randn_like(x), labels)  # draws in evaluations too

    def trained(attach: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        trainer, _ = build(tmp_path, Noisy(), eval_strategy="steps", eval_steps=2)
        if attach:
            FastEMATrainerCallback(**CONSTANT).attach(trainer)
        trainer.train()
        return snapshot(trainer.model)

    assert_same(trained(True), trained(False))


def test_ema_only_and_predict(tmp_path: Path) -> None:
    trainer, optimizer = build(tmp_path, eval_strategy="epoch")
    callback = FastEMATrainerCallback(**CONSTANT, evaluate="ema", predict="ema").attach(trainer)
    with pytest.raises(RuntimeError, match=r"trainer\.predict is to use the averaged weights, but there are none"):
        trainer.predict(Data(8))
    trainer.train()
    ema = loss_with(callback.ema_state_dict(), Data(8))
    assert trainer.state.log_history[-2]["eval_loss"] == pytest.approx(ema, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ema, rel=1e-5)
    assert trainer.predict(Data(8)).metrics["test_loss"] == pytest.approx(ema, rel=1e-5)
    assert_same(snapshot(trainer.model), optimizer.after_steps[-1])


@pytest.mark.parametrize("evaluate", ["both", "ema"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_trained_weights(tmp_path: Path, evaluate: Any, error: type[BaseException]) -> None:
    net = Net()
    trainer, optimizer = build(tmp_path, net, eval_strategy="epoch")
    callback = FastEMATrainerCallback(**CONSTANT, evaluate=evaluate).attach(trainer)
    net.fail_with = error
    with pytest.raises(error):
        trainer.train()
    assert len(optimizer.after_steps) == 5
    assert_same(net.evaluated[-1], callback.ema_state_dict())
    assert_same(snapshot(net), optimizer.after_steps[-1])
    assert callback.ema is not None and not callback.ema.is_applied
    # The Trainer is whole: it trains on, and shows its callbacks everything again.
    net.fail_with = None
    trainer.train()
    assert "on_evaluate" not in vars(trainer.callback_handler)
    assert callback.ema.num_updates == 10


# ---- checkpoints ----


def test_the_average_lies_beside_each_checkpoint_and_loads_without_fastema(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    tokens = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(8)]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=4, save_steps=2, learning_rate=0.01
        ),
        train_dataset=tokens,
    )
    callback = FastEMATrainerCallback((0.5, 0.9), decay_type="constant").attach(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    trained = snapshot(model)
    for folder in ("checkpoint-4", "final"):
        assert_same(snapshot(GPT2LMHeadModel.from_pretrained(tmp_path / folder)), trained)
        assert callback.ema is not None
        for which, name in enumerate(("ema", "ema_1")):
            fresh = GPT2LMHeadModel(config)
            safetensors.torch.load_model(fresh, tmp_path / folder / f"{name}.safetensors")
            assert_same(snapshot(fresh), callback.ema.shadow_state_dict(which))
        assert json.loads((tmp_path / folder / "ema.json").read_text()) == {
            "step": 4,
            "num_updates": 4,
            "last_update": 4,
            "decay": [0.5, 0.9],
            "decay_type": "constant",
            "decay_args": {},
        }
    earlier = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "ema.safetensors")
    assert not torch.equal(earlier["transformer.wte.weight"], callback.ema_state_dict()["transformer.wte.weight"])


@pytest.mark.parametrize("decay", [0.99, (0.5, 0.99)])
@pytest.mark.parametrize("last", [True, False])
def test_resume_is_bit_for_bit(tmp_path: Path, decay: Any, last: bool) -> None:
    def run(folder: Path, resume: Any = None) -> tuple[Trainer, FastEMATrainerCallback]:
        trainer, _ = build(
            folder,
            num_train_epochs=4,
            eval_strategy="epoch",
            save_strategy="steps",
            save_steps=4,
            gradient_accumulation_steps=2,
        )
        callback = FastEMATrainerCallback(decay, decay_type="warmup", start_step=1).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    whole, callback = run(tmp_path / "whole")
    resume: Any = str(tmp_path / "whole" / "checkpoint-8")
    folder = tmp_path / "resumed"
    if last:  # the same, as a killed run would find it
        folder.mkdir()
        (folder / "checkpoint-8").symlink_to(resume)
        resume = True
    resumed, again = run(folder, resume)
    assert resumed.state.global_step == whole.state.global_step == 12
    assert_same(snapshot(resumed.model), snapshot(whole.model))
    assert callback.ema is not None and again.ema is not None
    assert again.ema.num_updates == callback.ema.num_updates == 11
    for which in range(2 if isinstance(decay, tuple) else 1):
        assert_same(again.ema.shadow_state_dict(which), callback.ema.shadow_state_dict(which))
    for key in ("eval_loss", "eval_ema_loss"):
        assert [log[key] for log in resumed.state.log_history if key in log] == [
            log[key] for log in whole.state.log_history if key in log
        ]


def test_a_resume_without_an_average_warns_and_begins_at_once_where_the_start_has_passed(tmp_path: Path) -> None:
    build(tmp_path, save_strategy="epoch")[0].train()
    trainer, optimizer = build(tmp_path, num_train_epochs=3)
    callback = FastEMATrainerCallback(**CONSTANT, start_step=4).attach(trainer)
    with pytest.warns(UserWarning, match=r"checkpoint-10 has no average \(ema\.json\): one begins anew"):
        trainer.train(resume_from_checkpoint=True)
    first = safetensors.torch.load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert callback.ema is not None and callback.ema.num_updates == 5
    assert_average(callback.ema_state_dict(), average(first, optimizer.after_steps))


def test_a_resume_from_before_the_start_has_nothing_to_warn_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trainer = build(tmp_path, save_strategy="epoch")[0]
    FastEMATrainerCallback(start_step=10).attach(trainer)
    trainer.train()
    again = build(tmp_path, num_train_epochs=3)[0]
    callback = FastEMATrainerCallback(start_step=10).attach(again)
    again.train(resume_from_checkpoint=True)
    assert callback.ema is not None and callback.ema.num_updates == 5
    assert not [each for each in recwarn if "no average" in str(each.message)]


@pytest.mark.parametrize(
    ("evaluate", "metric"), [("both", "eval_ema_loss"), ("both", "ema_loss"), ("both", "eval_loss"), ("ema", "loss")]
)
def test_load_best_model_at_end_takes_the_weights_that_the_metric_was_of(
    tmp_path: Path, evaluate: Any, metric: str
) -> None:
    trainer, optimizer = build(
        tmp_path,
        num_train_epochs=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
    )
    callback = FastEMATrainerCallback(**CONSTANT, evaluate=evaluate).attach(trainer)
    first = snapshot(trainer.model)
    trainer.train()
    logged = "eval_ema_loss" if "ema" in metric else "eval_loss"
    losses = [log[logged] for log in trainer.state.log_history if logged in log]
    best = losses.index(max(losses))
    assert best < 3  # else the test shows nothing
    assert trainer.state.best_metric == losses[best]
    steps = 5 * (best + 1)
    assert callback.ema is not None and callback.ema.num_updates == steps
    assert_average(callback.ema_state_dict(), average(first, optimizer.after_steps[:steps]))
    if metric == "eval_loss":
        assert_same(snapshot(trainer.model), optimizer.after_steps[steps - 1])
    else:
        assert_same(snapshot(trainer.model), callback.ema_state_dict())
    assert trainer.evaluate()[logged] == pytest.approx(losses[best], rel=1e-6)


def test_an_evaluate_of_ones_own_reads_its_usual_metrics_in_both_runs(tmp_path: Path) -> None:
    class Own(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_double"] = 2 * metrics["eval_loss"]
            metrics["plain"] = 3 * metrics["eval_loss"]
            return metrics

    trainer, _ = build(tmp_path, trainer_class=Own)
    callback = FastEMATrainerCallback(**CONSTANT).attach(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    for prefix, weights in (("eval", snapshot(trainer.model)), ("eval_ema", callback.ema_state_dict())):
        assert metrics[f"{prefix}_loss"] == pytest.approx(loss_with(weights, Data(8)), rel=1e-5)
        assert metrics[f"{prefix}_double"] == 2 * metrics[f"{prefix}_loss"]
    assert metrics["plain"] == 3 * metrics["eval_loss"]
    assert metrics["eval_ema_plain"] == 3 * metrics["eval_ema_loss"]
    last, before = trainer.state.log_history[-1], trainer.state.log_history[-2]
    assert last["eval_loss"] == metrics["eval_loss"] and "eval_ema_loss" not in last
    assert before["eval_ema_loss"] == metrics["eval_ema_loss"] and "eval_loss" not in before


# ---- PEFT ----


class Causal(nn.Module):
    """A frozen base with a large embedding, to which an adapter is added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = PretrainedConfig()
        self.base = nn.Linear(4, 256)
        self.head = nn.Linear(256, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.base(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


@pytest.fixture
def adapted() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    return peft.get_peft_model(Causal(), peft.LoraConfig(target_modules=["base"], r=2))


def trained_adapter(adapted: Any, folder: Path, **args: Any) -> tuple[Trainer, FastEMATrainerCallback]:
    trainer, _ = build(folder, adapted, save_strategy="epoch", label_names=["labels"], **args)
    callback = FastEMATrainerCallback(**CONSTANT).attach(trainer)
    trainer.train()
    return trainer, callback


def test_of_a_peft_model_the_adapter_alone_is_averaged_and_saved(tmp_path: Path, adapted: Any) -> None:
    import peft

    first = snapshot(adapted)
    trainer, callback = trained_adapter(adapted, tmp_path)
    assert callback.ema is not None
    names = set(callback.ema.state_dict()["shadow"])
    assert names == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    expected = average(first, trainer.optimizer.optimizer.after_steps)  # Accelerate's wrapper, ours inside
    for name in names:
        torch.testing.assert_close(callback.ema_state_dict()[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    folder = tmp_path / "checkpoint-10"
    assert set(safetensors.torch.load_file(folder / "ema.safetensors")) == names
    again = peft.PeftModel.from_pretrained(Causal(), folder / "ema_adapter").eval()
    with callback.ema.swapped(), torch.no_grad():
        torch.testing.assert_close(again(Data().x), adapted.eval()(Data().x), rtol=0, atol=0)
    size = sum(file.stat().st_size for file in (folder / "ema_adapter").iterdir() if file.suffix == ".safetensors")
    assert size == (folder / "adapter_model.safetensors").stat().st_size


def test_a_peft_training_resumes_exactly(tmp_path: Path, adapted: Any) -> None:
    start = snapshot(adapted)
    _, whole = trained_adapter(adapted, tmp_path / "whole")
    with torch.no_grad():
        for name, value in adapted.state_dict().items():
            value.copy_(start[name])
    trainer, _ = build(tmp_path / "rest", adapted, label_names=["labels"])
    callback = FastEMATrainerCallback(**CONSTANT).attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert callback.ema is not None and whole.ema is not None
    assert_same(callback.ema.state_dict()["shadow"], whole.ema.state_dict()["shadow"])


def test_the_averaged_adapter_can_be_merged(tmp_path: Path, adapted: Any) -> None:
    _, callback = trained_adapter(adapted, tmp_path)
    adapted.eval()
    assert callback.ema is not None
    with callback.ema.swapped(), torch.no_grad():
        expected = adapted(Data().x)
    callback.ema.copy_to()  # inside a swap the merge would take the trained adapter away
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(Data().x), expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_is_not_active_keeps_its_average(tmp_path: Path, adapted: Any) -> None:
    import peft

    adapted.add_adapter("other", peft.LoraConfig(target_modules=["base"], r=2))
    _, first = trained_adapter(adapted, tmp_path / "first")
    assert first.ema is not None
    averages = {name: value.clone() for name, value in first.ema.state_dict()["shadow"].items()}
    adapted.set_adapter("other")
    live = {name: value for name, value in snapshot(adapted).items() if "default" in name}
    trainer, _ = build(tmp_path / "second", adapted, label_names=["labels"], num_train_epochs=3)
    callback = FastEMATrainerCallback(**CONSTANT).attach(trainer)
    # The optimizer of the checkpoint is of the other adapter.
    (tmp_path / "first" / "checkpoint-10" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="the checkpoint has no average of .*other.*starting as a copy"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-10"))
    assert callback.ema is not None
    now = callback.ema.state_dict()["shadow"]
    assert set(now) > set(averages) and len(now) == 2 * len(averages)
    left = CONSTANT["decay"] ** (trainer.state.global_step - 10)
    for name, value in averages.items():
        expected = live[name] + left * (value - live[name]) if name in live else None
        torch.testing.assert_close(now[name], expected.to(now[name]), rtol=1e-5, atol=1e-6)


def test_an_adapter_left_merged_at_the_end_of_an_evaluation_is_an_error(tmp_path: Path, adapted: Any) -> None:
    _, callback = trained_adapter(adapted, tmp_path)
    ema, x = callback.ema, Data().x
    assert ema is not None
    adapted.eval()
    with torch.no_grad():
        trained = adapted(x)
        with pytest.raises(SwapError, match="merged into a Linear"), ema.swapped():
            average = adapted(x)
            adapted.merge_adapter()
            torch.testing.assert_close(adapted(x), average, rtol=1e-4, atol=1e-5)
        adapted.unmerge_adapter()
        ema.restore()
        torch.testing.assert_close(adapted(x), trained, rtol=1e-4, atol=1e-5)


# ---- saving ----


def test_save_model_inside_an_evaluation_of_the_average_saves_the_trained_weights(tmp_path: Path) -> None:
    class Saves(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.save_model(str(tmp_path / "inside"))
            self.seen = snapshot(kwargs["model"])

    saves = Saves()
    trainer, optimizer = build(tmp_path, eval_strategy="epoch", num_train_epochs=1, callbacks=[saves])
    callback = FastEMATrainerCallback(**CONSTANT, evaluate="ema").attach(trainer)
    trainer.train()
    net = Net()
    safetensors.torch.load_model(net, tmp_path / "inside" / "model.safetensors")
    assert_same(snapshot(net), optimizer.after_steps[-1])
    safetensors.torch.load_model(net, tmp_path / "inside" / "ema.safetensors")
    assert_same(snapshot(net), callback.ema_state_dict())
    assert_same(saves.seen, callback.ema_state_dict())


def test_averages_of_bfloat16_weights_are_copied_one_after_the_other(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(12))).bfloat16()
    ema = FastEMA(model, decay=[0.5, 0.9, 0.99])
    with AliveBytes() as alive:
        write_average(ema, tmp_path, model)
    assert alive.most < 3 * 12 * 4 * 32 * 32, "an average, and a copy of it for the file"
    again = FastEMA(model, decay=[0.5, 0.9, 0.99])
    read_average(again, tmp_path)
    for which in range(3):
        assert_same(again.shadow_state_dict(which), ema.shadow_state_dict(which))


# ---- what goes wrong ----


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    forgotten = FastEMATrainerCallback()
    trainer, _ = build(tmp_path, callbacks=[forgotten])
    with pytest.raises(RuntimeError, match=r"not attached: call callback\.attach\(trainer\)"):
        trainer.train()
    with pytest.raises(RuntimeError, match="several decays"):
        FastEMATrainerCallback().attach(trainer)
    assert forgotten.attach(trainer) is forgotten
    assert trainer.callback_handler.callbacks.count(forgotten) == 1
    with pytest.raises(RuntimeError, match="attached already"):
        forgotten.attach(trainer)
    with pytest.raises(ValueError, match="bf16_full_eval"):
        FastEMATrainerCallback().attach(build(tmp_path, bf16_full_eval=True)[0])
    with pytest.raises(RuntimeError, match="no average yet"):
        forgotten.ema_state_dict()
    with pytest.raises(ValueError, match="decay"):
        FastEMATrainerCallback(-0.1)
    with pytest.raises(TypeError, match="no_such_argument"):
        FastEMATrainerCallback(no_such_argument=1)
    with pytest.raises(ValueError, match="evaluate must be one of"):
        FastEMATrainerCallback(evaluate="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start_epoch"):
        FastEMATrainerCallback(start_epoch=-1)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, save_strategy="epoch", num_train_epochs=1)
    FastEMATrainerCallback().attach(trainer)
    trainer.train()
    folder = tmp_path / "checkpoint-5"
    tensors = safetensors.torch.load_file(folder / "ema.safetensors")
    del tensors["head.bias"]
    safetensors.torch.save_file(tensors, folder / "ema.safetensors", metadata={"format": "pt"})
    trainer, _ = build(tmp_path)
    FastEMATrainerCallback().attach(trainer)
    with pytest.raises(ValueError, match=r"the state is of another model: .*'head\.bias' is missing"):
        trainer.train(resume_from_checkpoint=True)


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(ours)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys, fastema; print([m for m in sys.modules if 'transformers' in m])", "[]"),
        (
            "import sys; sys.modules['transformers'] = None\n"
            "try: import fastema.integrations.transformers\n"
            "except ImportError as error: print(error)",
            "transformers is not installed: pip install fastema[transformers]",
        ),
    ],
    ids=["never imported", "missing"],
)
def test_import(code: str, expected: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == expected
