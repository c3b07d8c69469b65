"""The logs of trainers: which metric and average are taken, in which order, by which clock."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from advisor.log_writers import FORMATS
from fastema.advisor.history_files import History, average_of, metric_of, other_metrics, read_history
from fastema.advisor.metric_names import is_averaged, known_mode_of, mode_of
from fastema.advisor.series import Series, series_of

BASE = [0.3 + 0.4 * (1 - math.exp(-epoch / 4)) for epoch in range(12)]
EMA = [value + 0.01 for value in BASE]


def read(folder: Path, text: str, name: str = "log.txt") -> History:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return read_history(file)


def series(folder: Path, text: str, name: str = "log.txt", metric: str | None = None) -> Series:
    seen = read(folder, text, name)
    chosen = metric_of(seen, metric)
    return series_of(seen, chosen, average_of(seen, chosen))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_without_a_flag(name: str, tmp_path: Path) -> None:
    kind = FORMATS[name]
    seen = read(tmp_path, kind.write(BASE, EMA), kind.file)
    metric = metric_of(seen, None)
    average = average_of(seen, metric)
    assert (metric, average) == (kind.metric, kind.average)
    found = series_of(seen, metric, average)
    assert found.base == pytest.approx([kind.scale * value for value in BASE], abs=1e-4 * kind.scale)
    if average is not None:
        assert found.ema == pytest.approx([kind.scale * value for value in EMA], abs=1e-4 * kind.scale)
    assert found.notes == []


ONE_VALUE = ("Hugging Face", "Keras' history", "nnU-Net 2's logger", "nested JSON")  # which holds one run


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ONE_VALUE])
def test_a_second_run_in_the_file_is_noticed(name: str, tmp_path: Path) -> None:
    kind = FORMATS[name]
    first, second = kind.write(BASE, EMA), kind.write([value / 2 for value in BASE], [value / 2 for value in EMA])
    found = series(tmp_path, f"{first.rstrip()}\n{second}", kind.file)
    assert found.base == pytest.approx([kind.scale * value / 2 for value in BASE], abs=1e-4 * kind.scale)
    assert "2 runs" in found.notes[0]


def test_rows_are_not_merged_across_the_file(tmp_path: Path) -> None:
    """mmengine counts iterations in the rows of the training and epochs in those of the validation, both as `step`."""
    rows: list[dict[str, float]] = []
    for epoch in range(1, 5):
        rows += [{"loss": 1 / epoch, "step": 2 * epoch}, {"mIoU": 10.0 * epoch, "step": epoch}]
    found = series(tmp_path, "\n".join(map(json.dumps, rows)), "scalars.json")
    assert found.base == [10, 20, 30, 40]
    assert (found.clock.span(), found.updates_per_epoch) == ("4 epochs", 2)
    zero = [{**row, "step": 0} if "mIoU" in row else row for row in rows]
    assert series(tmp_path, "\n".join(map(json.dumps, zero)), "scalars.json").base == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("name", "span", "updates"),
    [
        ("mmengine", "12 epochs", 15),
        ("mmcv 1", "12 epochs", 100),
        ("detectron2", "12 evaluations, steps 99 to 1,199", 100),
        ("DETR", "12 epochs", None),
        ("Hugging Face", "12 epochs", 100),
        ("Lightning", "12 epochs", 50),
        ("Keras", "12 evaluations in 24 epochs", None),
        ("MLflow, a metric", "12 epochs", None),
        ("W&B, a run", "12 epochs", None),  # its _step counts calls of log()
        ("Megatron", "12 evaluations, steps 1,000 to 12,000", 1000),
        ("Keras' history", "12 evaluations", None),
    ],
)
def test_the_clock(name: str, span: str, updates: float | None, tmp_path: Path) -> None:
    kind = FORMATS[name]
    found = series(tmp_path, kind.write(BASE, EMA), kind.file)
    assert (found.clock.span(), found.updates_per_epoch) == (span, updates)


def test_twenty_evaluations_in_two_epochs_are_no_twenty_epochs(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [{"epoch": 0, "step": 0, "eval_acc": 0.1}]  # eval_on_start
    rows += [{"epoch": i / 10, "step": 100 * i, "eval_acc": 0.1 + i / 50} for i in range(1, 21)]
    found = series(tmp_path, json.dumps({"log_history": rows}))
    assert found.clock.span() == "21 evaluations in 2 epochs"
    assert found.updates_per_epoch == pytest.approx(1000)
    lines = "epoch,step,val_acc\n" + "".join(f"{i // 10},{100 * i + 99},{0.1 + i / 50}\n" for i in range(20))
    found = series(tmp_path, lines)
    assert found.clock.span() == "20 evaluations in 2 epochs"
    assert found.updates_per_epoch == pytest.approx(1000)


def test_the_end_of_a_run(tmp_path: Path) -> None:
    rows = "".join(f"{e},{BASE[e]},{0.1 * (1 - e / 11)}\n" for e in range(12))
    found = series(tmp_path, f"epoch,val_iou,lr\n{rows}")
    assert (found.final_rate, found.over) == (0, "the learning rate is at 0")
    state = {"max_steps": 30, "log_history": [{"epoch": e, "step": 10 * e, "eval_acc": 0.5} for e in (1, 2, 3)]}
    assert series(tmp_path, json.dumps(state)).over == "step 30 of 30 is done"
    text = "".join(f"Epoch {e}/3: val acc 0.{e}\n" for e in (1, 2, 3))
    assert series(tmp_path, text).over == "epoch 3 of 3 is done"
    assert series(tmp_path, text.replace("/3", "/30")).over == ""


def test_a_resumed_run_is_one(tmp_path: Path) -> None:
    rows = [f"{e},{BASE[e]}" for e in [*range(8), *range(5, 12)]]
    found = series(tmp_path, "\n".join(["epoch,val_iou", *rows]))
    assert found.base == BASE
    assert found.notes == ["It was resumed: 3 later values from before are left out."]


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    rows = ["epoch,val_loss", *(f"{e},{'nan' if e in (3, 7) else 1 - BASE[e]}" for e in range(12))]
    found = series(tmp_path, "\n".join(rows))
    assert len(found.base) == 10
    assert found.clock.labels[3] == 4
    assert "2 of 12 values" in found.notes[0]
    rows = ["epoch,val_loss", *(f"{e},{'nan' if e > 8 else 1 - BASE[e]}" for e in range(12))]
    assert series(tmp_path, "\n".join(rows)).diverged_at == "epoch 9"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Epoch 50: Loss increasing, IoU dropping\n", "holds no metric"),
        ("lr: 0.1\nloss: mse\nbatch_size: 12\nmetric: iou\nBASE_LR: 0.3\nloss_weight: 2\n", "holds no metric"),
        ("This is pdfTeX, Version 3.14\nentering extended mode\nLaTeX2e <2024-11-01> patch level 2\n", "holds no"),
        ("wandb: logged in\nTraceback (most recent call last):\n  File 'a.py', line 3\nError 404\n", "no metric"),
        ("epoch,foo,bar\n1,2,3\n2,3,4\n", "Give --metric: foo, bar"),
        ("epoch,val_foo,val_bar\n1,2,3\n2,3,4\n", "Give --metric: val_foo, val_bar"),
        ("0.5\n0.6\n", "Give --metric: log"),
    ],
)  # fmt: skip
def test_what_holds_no_metric_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        metric_of(read(tmp_path, text), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "metric"),
    [
        ("train_loss,val_loss", "val_loss"),
        ("loss,accuracy,val_loss,val_accuracy", "val_accuracy"),
        ("eval_loss,eval_f1,eval_accuracy", "eval_f1"),
        ("eval_loss,eval_wer,eval_cer", "eval_wer"),
        ("val_acc,test_acc", "val_acc"),
        ("aAcc,mIoU,mAcc,IoU.road", "mIoU"),
        ("metrics/precision(B),metrics/recall(B),metrics/mAP50(B),metrics/mAP50-95(B)", "metrics/mAP50-95(B)"),
        ("total_loss,loss_cls,loss_box_reg,fast_rcnn/cls_accuracy", "total_loss"),
        ("val_loss,val_loss_dose_1.0,val_loss_dose_0.5", "val_loss"),
        ("best_val_acc,val_loss,val_time", "val_loss"),
        ("ema_fg_dice,mean_fg_dice", "mean_fg_dice"),
        ("val_ema_iou", "val_ema_iou"),
        ("train_acc,train_loss", "train_acc"),
        ("loss,dice_coef,val_loss,val_dice_coef", "val_dice_coef"),
        ("train_loss_step,train_loss_epoch,val_loss_epoch,val_dice_epoch", "val_dice_epoch"),
        ("train/epoch_loss,validation/epoch_loss,validation/epoch_learning_rate", "validation/epoch_loss"),
        ("val_loss,val_mean_io_u", "val_mean_io_u"),
        ("val_Sm,val_wFm,val_mae", "val_Sm"),
        ("val/mae,val/S_alpha,val/E_phi,val/beta", "val/S_alpha"),
        ("val_loss,val_kl_coef,val_epoch,best_epoch", "val_loss"),
        ("val/bestEpoch,val/bestIoU,val/MAE", "val/MAE"),
    ],
)
def test_of_several_metrics_the_main_one_is_taken(names: str, metric: str, tmp_path: Path) -> None:
    count = names.count(",") + 1
    seen = read(tmp_path, f"epoch,{names}\n" + "".join(f"{e}{',0.5' * count}\n" for e in range(3)))
    assert metric_of(seen, None) == metric
    assert metric not in other_metrics(seen, metric)


@pytest.mark.parametrize(
    ("base", "average"),
    [
        ("val/mAP_50_95", "val/ema_mAP_50_95"),
        ("eval/acc", "eval/ema/acc"),
        ("val/loss", "ema/val/loss"),
        ("dev_loss", "dev_ema_loss"),
        ("mAP", "mAP_EMA"),
        ("valLoss", "valEmaLoss"),
        ("val_acc", "swa_val_acc"),
        ("iou/base", "iou/ema"),
        ("val/model_acc", "val/ema_model_acc"),
        ("run-7 - val/iou", "run-7 - val_ema/iou"),
        ("Base IoU", "EMA IoU"),
        ("val_dice_epoch", "val_ema_dice_epoch"),
    ],
)
def test_the_averages_column(base: str, average: str, tmp_path: Path) -> None:
    seen = read(tmp_path, f"epoch,{average},{base}\n1,0.5,0.6\n2,0.6,0.7\n")
    assert metric_of(seen, None) == base
    assert average_of(seen, base) == average


def test_what_is_no_average_of_weights() -> None:
    for name in ("ema_fg_dice", "EMA pseudo Dice", "schema_loss", "train/loss_ema", "ema_train_loss"):
        assert not is_averaged(name), name


def test_which_way_is_better() -> None:
    less = (
        "loss val/loss eval-loss test_MAE train.err nll logloss cross_entropy val_ce kl bpb bits_per_dim lpips epe eer "
        "der per ter mape smape msle rmsle brier ece kid fvd hd95 assd chamfer abs_rel nme err@1 valLoss fid log_loss "
        "test_class_error WER perplexity val_ppl DiarizationErrorRate rmse"
    )
    for name in less.split():
        assert mode_of(name) == "min", name
    more = (
        "iou accuracy AUC mIoU val/mAP50-95(B) Acc@1 eval_top1 val_f1 psnr SSIM bleu MeanIoU R2 mean_fg_dice kappa "
        "test_coco_eval_bbox neg_mean_squared_error episode_reward acc_per_class"
    )
    for name in more.split():
        assert mode_of(name) == "max", name
    for name in ("Value", "foo", "glossary"):
        assert known_mode_of(name) is None, name
        with pytest.raises(ValueError, match="--mode max or --mode min"):
            mode_of(name)


def test_detectron2s_printed_scores(tmp_path: Path) -> None:
    d2 = "[12/01 10:00:00 d2.evaluation.testing]: copypaste: "
    text = "".join(
        f"[12/01 10:00:00 d2.utils.events]: eta: 1:02:03  iter: {500 * at}  total_loss: 0.8{at}  lr: 0.00025\n"
        f"{d2}Task: bbox\n{d2}AP,AP50,APl\n{d2}{30 + at}.5,{50 + at}.5,nan\n"
        f"{d2}Task: segm\n{d2}AP,AP50,APl\n{d2}{20 + at}.5,{40 + at}.5,nan\n"
        for at in range(1, 4)
    )
    seen = read(tmp_path, text)
    assert metric_of(seen, None) == "bbox/AP"
    found = series_of(seen, "segm/AP50")
    assert found.base == [41.5, 42.5, 43.5]
    assert found.clock.labels == [500, 1000, 1500]
    assert series_of(seen, "total_loss").of_training


def test_thousands_of_rows(tmp_path: Path) -> None:
    rows = [f"{i},{i // 100},{1 / (1 + i / 1000):.5f}" for i in range(20_000)]
    found = series(tmp_path, "\n".join(["step,epoch,val_loss", *rows]))
    assert found.clock.span() == "20,000 evaluations in 200 epochs"


def test_an_average_that_is_logged_apart_is_found_by_its_clock(tmp_path: Path) -> None:
    rows = [{"epoch": e, "val_acc": BASE[e]} for e in range(12)] + [
        {"epoch": e, "val_ema_acc": EMA[e]} for e in range(4, 12)
    ]
    assert series(tmp_path, "\n".join(map(json.dumps, rows))).ema == [None] * 4 + EMA[4:]
