"""Logs as trainers write them, with given values: after the writers' sources, or from their printed lines.

Every writer gets the model's and the average's metric, a value an epoch; formats without an average leave it out.
"""

# ruff: noqa: E501 - lines of logs are as long as they are

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Values = Sequence[float]


@dataclass(frozen=True)
class Format:
    """A kind of log.

    Attributes:
        file: how it is called.
        write: returns its text.
        metric: the column that a reader takes.
        average: the column of the average; None: it has none.
        scale: by which the file's numbers are larger.
    """

    file: str
    write: Callable[[Values, Values], str]
    metric: str
    average: str | None = None
    scale: float = 1.0


def _lines(rows: Sequence[dict[str, object]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _table(heading: str, row: Callable[[int, float, float], str]) -> Callable[[Values, Values], str]:
    return lambda base, ema: (
        f"{heading}\n" + "".join(f"{row(i, b, e)}\n" for i, (b, e) in enumerate(zip(base, ema, strict=True)))
    )


def _text(row: Callable[[int, float, float], str]) -> Callable[[Values, Values], str]:
    return lambda base, ema: "".join(f"{row(i, b, e)}\n" for i, (b, e) in enumerate(zip(base, ema, strict=True)))


def _mmengine(base: Values, ema: Values) -> str:
    rows: list[dict[str, object]] = []
    for e, value in enumerate(base, 1):
        rows += [
            {"lr": 0.01, "data_time": 0.1, "loss": 1 / e, "time": 0.2, "epoch": e, "iter": 15 * (e - 1) + i,
             "memory": 4000, "step": 15 * (e - 1) + i}
            for i in (5, 10, 15)
        ]  # fmt: skip
        rows.append({"aAcc": 80.0, "mIoU": value, "mAcc": 60.0, "data_time": 0.1, "time": 0.2, "step": e})
    return _lines(rows)


def _mmcv(base: Values, ema: Values) -> str:
    rows: list[dict[str, object]] = [{"env_info": "sys.platform: linux\nPython: 3.8", "seed": 0, "exp_name": "fcn.py"}]
    for e, value in enumerate(base, 1):
        rows += [
            {"mode": "train", "epoch": e, "iter": i, "lr": 0.01, "memory": 4000, "decode.loss_ce": 0.5,
             "decode.acc_seg": 90.0, "loss": 0.5}
            for i in (50, 100)
        ]  # fmt: skip
        rows.append(
            {
                "mode": "val",
                "epoch": e,
                "iter": 25,
                "lr": 0.01,
                "aAcc": 0.8,
                "mIoU": value,
                "mAcc": 0.6,
                "IoU.road": 0.9,
            }
        )
    return _lines(rows)


def _detectron2(base: Values, ema: Values) -> str:
    rows: list[dict[str, object]] = []
    for i in range(5 * len(base)):
        row: dict[str, object] = {
            "data_time": 0.1, "fast_rcnn/cls_accuracy": 0.9, "iteration": 20 * i + 19, "lr": 0.001, "total_loss": 1.5,
        }  # fmt: skip
        if i % 5 == 4:
            row |= {
                "bbox/AP": 100 * base[i // 5],
                "bbox/AP50": 60.0,
                "bbox/AP-car": 30.0,
                "bbox_ema/AP": 100 * ema[i // 5],
            }
        rows.append(row)
    return _lines(rows)


def _detr(base: Values, ema: Values) -> str:
    return _lines(
        [
            {"train_lr": 1e-4, "train_class_error": 90.0, "train_loss": 5.0, "test_class_error": 80.0, "test_loss": 4.0,
             "test_coco_eval_bbox": [value, 0.6, 0.4, 0.1, 0.3, 0.5], "epoch": e, "n_parameters": 41_000_000}
            for e, value in enumerate(base)
        ]
    )  # fmt: skip


def _hugging_face(base: Values, ema: Values) -> str:
    rows: list[dict[str, object]] = []
    for e, (value, averaged) in enumerate(zip(base, ema, strict=True), 1):
        rows += [
            {"epoch": float(e), "grad_norm": 1.0, "learning_rate": 5e-5, "loss": 0.5, "step": 100 * e},
            {"epoch": float(e), "eval_ema_accuracy": averaged, "eval_ema_loss": 0.4, "step": 100 * e},
            {"epoch": float(e), "eval_accuracy": value, "eval_loss": 0.4, "eval_runtime": 3.2,
             "eval_samples_per_second": 99.0, "step": 100 * e},
        ]  # fmt: skip
    state = {"best_metric": None, "global_step": 100 * len(base), "max_steps": 100_000, "num_train_epochs": 1000}
    return json.dumps({**state, "log_history": rows}, indent=2)


def _lightning(base: Values, ema: Values) -> str:
    return "epoch,step,train_loss,val_acc,val_ema_acc,val_loss\n" + "".join(
        f"{e},{50 * e + 24},0.5,,,\n{e},{50 * e + 49},0.4,,,\n{e},{50 * e + 49},,,{b},\n{e},{50 * e + 49},,{a},,0.4\n"
        for e, (a, b) in enumerate(zip(base, ema, strict=True))
    )


def _ultralytics(base: Values, ema: Values) -> str:
    names = (
        "epoch,time,train/box_loss,train/cls_loss,train/dfl_loss,metrics/precision(B),metrics/recall(B),metrics/mAP50(B),"
        "metrics/mAP50-95(B),val/box_loss,val/cls_loss,val/dfl_loss,lr/pg0,lr/pg1,lr/pg2"
    )
    return f"{names}\n" + "".join(
        f"{e},{9.5 * e},1.2,0.9,1.1,0.8,0.7,0.75,{value:.5f},1.3,1,1.2,0.001,0.001,0.001\n"
        for e, value in enumerate(base, 1)
    )


def _wandb_history(base: Values, ema: Values) -> str:
    rows = ["_step,_runtime,_timestamp,epoch,train/loss,val/acc,val/loss"]
    for e, value in enumerate(base):
        rows += [f"{10 * e + i},{10 * e + i}.5,1700000000,{e},0.5,," for i in range(9)]
        rows.append(f"{10 * e + 9},{10 * e + 9}.5,1700000000,{e},,{value},0.4")
    return "\n".join(rows)


def _mlflow_table(base: Values, ema: Values) -> str:
    rows = [f"r1,val_loss,{e},1700000000000,0.5" for e in range(len(base))]
    return "\n".join(
        ["Run,metric,step,timestamp,value", *rows, *(f"r1,val_acc,{e},1700000000000,{v}" for e, v in enumerate(base))]
    )


def _timm_printed(base: Values, ema: Values) -> str:
    lines = []
    for e, (value, averaged) in enumerate(zip(base, ema, strict=True)):
        lines += [
            f"Train: {e} [{i:>4}/100 ({i:>3}%)]  Loss: 2.1 (2.2)  Time: 0.5s,  200.1/s  (0.6s,  190.0/s)  "
            f"LR: 1.000e-03  Data: 0.01 (0.02)"
            for i in (0, 50, 99)
        ]
        for name, end in (("Test", value), ("Test (EMA)", averaged)):
            lines += [
                f"{name}: [{i:>4}/78]  Time: 0.211 (0.211)  Loss:   0.9 (0.8)  Acc@1:  90.0 ({100 * end * i / 78:.3f})  "
                f"Acc@5:  99.0 ( 98.0)"
                for i in (39, 78)
            ]
    return "\n".join(lines)


def _swin_printed(base: Values, ema: Values) -> str:
    at = "[2021-08-09 16:04:31 swin] (main.py 190): INFO"
    return "".join(
        f"{at} Train: [{e}/300][0/1251]\teta 1 day, 2:00:00 lr 0.000001\ttime 0.5 (0.5)\tloss 6.9 (6.9)\tmem 8000MB\n"
        f"{at} Test: [0/98]\tTime 1.2 (1.2)\tLoss 0.5 (0.5)\tAcc@1 90.0 (90.0)\tAcc@5 98 (98)\tMem 8000MB\n"
        f"{at}  * Acc@1 {100 * value:.3f} Acc@5 95.516\n{at} Accuracy of the network on the 50000 test images: "
        f"{100 * value:.1f}%\n{at} Max accuracy: {100 * max(base[: e + 1]):.2f}%\n"
        for e, value in enumerate(base)
    )


def _keras_printed(base: Values, ema: Values) -> str:
    return "".join(
        f"Epoch {e}/99\n\r 1/80 [>....] - ETA: 5s - loss: 0.9\r80/80 [====] - ETA: 0s - loss: 0.0759\n"
        f"Epoch {e}: val_accuracy improved from 0.10000 to {value:.5f}, saving model to m.keras\n"
        f"80/80 [==============================] - 15s 145ms/step - loss: 0.6 - accuracy: 0.9 - val_loss: 0.5 "
        f"- val_accuracy: {value:.4f} - learning_rate: 0.0010\n"
        for e, value in enumerate(base, 1)
    )


def _nnunet1(base: Values, ema: Values) -> str:
    at = "2021-06-21 08:17:05.605214"
    return "Please cite the following paper when using nnUNet:\n" + "".join(
        f"{at}: \nepoch:  {e} \n{at}: train loss : -0.75 \n{at}: validation loss: -0.52 \n"
        f"{at}: Average global foreground Dice: [{value - 0.1}, {value + 0.1}] \n"
        f"{at}: (interpret this as an estimate for the Dice of the different classes. This is not exact.) \n"
        f"{at}: lr: 0.009 \n{at}: This epoch took 288.041806 s\n \n"
        for e, value in enumerate(base)
    )


def _nnunet2(base: Values, ema: Values) -> str:
    at = "2025-11-19 00:07:35.259727"
    return "".join(
        f"{at}:  \n{at}: Epoch {e} \n{at}: Current learning rate: 0.00935 \n{at}: train_loss -0.5525 \n"
        f"{at}: val_loss -0.5249 \n{at}: Pseudo dice [np.float32({value - 0.1:.4f}), np.float32({value + 0.1:.4f})] \n"
        f"{at}: Epoch time: 96.61 s \n{at}: Yayy! New best EMA pseudo Dice: 0.5845999717712402 \n"
        for e, value in enumerate(base)
    )


def _fairseq(base: Values, ema: Values) -> str:
    at = "2020-05-01 10:00:00 | INFO"
    return "".join(
        f"{at} | train | epoch {e:03d} | loss 9.1 | ppl 370 | wps 1000 | num_updates {1000 * e} | lr 0.0005 | gnorm 1.2\n"
        f"{at} | valid | epoch {e:03d} | valid on 'valid' subset | loss 8.5 | bleu {value:.5f} | num_updates {1000 * e}\n"
        for e, value in enumerate(base, 1)
    )


def _megatron(base: Values, ema: Values) -> str:
    return "".join(
        f" iteration {1000 * e:>8}/  500000 | consumed samples: 256,000 | elapsed time per iteration (ms): 500.1 | "
        f"learning rate: 1.500E-04 | global batch size: 256 | lm loss: 2.1E+00 | loss scale: 1.0 | grad norm: 1.0 |\n"
        f" validation loss at iteration {1000 * e} | lm loss value: {value:.6E} | lm loss PPL: 7.0E+00 |\n"
        for e, value in enumerate(base, 1)
    )


def _bars(base: Values, ema: Values) -> str:
    return "".join(
        f"Epoch {e}: 100%|████████| 98/98 [07:47<00:00, 4.1it/s, loss=140]\n"
        f"Validation: 100%|████████| 19/19 [00:32<00:00, 2it/s, val_iou=0.99]\n\n"
        f"Epoch {e}/100 - Train Loss: 10.234567, Val IoU: {value:.6f}\n✓ New best model saved (val_iou: {value:.6f})\n"
        for e, value in enumerate(base, 1)
    )


FORMATS: dict[str, Format] = {
    "fastema train, printed": Format(
        "train.log",
        _text(lambda i, b, e: f"Epoch {i + 1}: Loss: 0.2341 | IoU: {b:.5f} (base) | EMA IoU: {e:.5f} | LR: 0.000200"),
        "IoU",
        "EMA IoU",
    ),
    "the guide's case study": Format(
        "study.txt", _text(lambda i, b, e: f"Epoch {i}: Base IoU: {b:.5f} | EMA IoU: {e:.5f} (+0.002)"), "Base IoU", "EMA IoU"
    ),
    "mmengine": Format("scalars.json", _mmengine, "mIoU"),
    "mmcv 1": Format("20210701.log.json", _mmcv, "mIoU"),
    "mmengine, printed": Format(
        "20230605.log",
        _text(
            lambda i, b, e: f"2023/06/05 20:10:13 - mmengine - INFO - Epoch(train)   [{i + 1}][6/6]  lr: 4.0e-03  "
            f"eta: 4:59:11  time: 9.97  data_time: 9.01  loss: 0.42  acc_pose: 0.007\n"
            f"2023/06/05 20:10:13 - mmengine - INFO - Epoch(val) [{i + 1}][2/2]    coco/AP: {b:.6f}  coco/AP .5: 0.9"
        ),
        "val/coco/AP",
    ),
    "mmseg 0, printed": Format(
        "20210701.log",
        _text(
            lambda i, b, e: f"2021-07-01 10:00:00,123 - mmseg - INFO - Iter [{1000 * (i + 1)}/160000]\tlr: 1.2e-03, "
            f"eta: 1 day, 3:00:00, time: 0.6, memory: 8000, decode.loss_ce: 0.5, decode.acc_seg: 80.0, loss: 0.5\n"
            f"2021-07-01 10:00:00,123 - mmseg - INFO - Iter(val) [250]\taAcc: 0.79, mIoU: {b:.5f}, IoU.road: 0.9"
        ),
        "val/mIoU",
    ),
    "detectron2": Format("metrics.json", _detectron2, "bbox/AP", "bbox_ema/AP", 100),
    "DETR": Format("log.txt", _detr, "test_coco_eval_bbox"),
    "Hugging Face": Format("trainer_state.json", _hugging_face, "eval_accuracy", "eval_ema_accuracy"),
    "Hugging Face, printed": Format(
        "out.log",
        _text(
            lambda i, b, e: f"{{'loss': 0.5, 'grad_norm': 1.2, 'learning_rate': 5e-05, 'epoch': {i + 0.5}}}\n"
            f"{{'eval_loss': 0.4, 'eval_accuracy': {b}, 'eval_runtime': 1.2, 'epoch': {i + 1.0}}}"
        ),
        "eval_accuracy",
    ),
    "Lightning": Format("metrics.csv", _lightning, "val_acc", "val_ema_acc"),
    "Lightning's bar": Format(
        "out.txt",
        _text(
            lambda i, b, e: f"\rEpoch {i}: 100%|██| 10/10 [00:01<00:00, 9.5it/s, v_num=0, train_loss=0.5, "
            f"val_loss=0.4, val_acc={b:.5f}]"
        ),
        "val_acc",
    ),
    "ultralytics": Format("results.csv", _ultralytics, "metrics/mAP50-95(B)"),
    "RF-DETR": Format(
        "metrics.csv",
        _table("epoch,val/mAP_50_95,val/ema_mAP_50_95,val/loss", lambda i, b, e: f"{i},{b},{e},0.4"),
        "val/mAP_50_95",
        "val/ema_mAP_50_95",
    ),
    "timm": Format(
        "summary.csv",
        _table(
            "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr", lambda i, b, e: f"{i},2.1,0.9,{100 * b},95.0,0.05"
        ),
        "eval_top1",
        scale=100,
    ),
    "timm, printed": Format("out.txt", _timm_printed, "test/Acc@1", "test/ema/Acc@1", 100),
    "Swin, printed": Format("log_rank0.txt", _swin_printed, "Acc@1", scale=100),
    "Keras": Format(
        "log.csv",
        _table("epoch,accuracy,loss,val_accuracy,val_loss", lambda i, b, e: f"{2 * i},0.9,0.3,NA,NA\n{2 * i + 1},0.9,0.3,{b},0.4"),
        "val_accuracy",
    ),
    "Keras, printed": Format("out.txt", _keras_printed, "val_accuracy"),
    "Keras' history": Format(
        "history.json",
        lambda base, ema: json.dumps({"loss": [0.4] * len(base), "accuracy": [0.9] * len(base), "val_loss": [0.5] * len(base), "val_accuracy": list(base)}),
        "val_accuracy",
    ),
    "nnU-Net 1": Format("training_log_2021.txt", _nnunet1, "Average global foreground Dice"),
    "nnU-Net 2": Format("training_log_2025.txt", _nnunet2, "Pseudo dice"),
    "nnU-Net 2's logger": Format(
        "log.json",
        lambda base, ema: json.dumps({"mean_fg_dice": list(base), "ema_fg_dice": list(ema), "val_losses": [-0.5] * len(base), "lrs": [0.01] * len(base)}),
        "mean_fg_dice",
    ),
    "W&B, a chart": Format(
        "wandb_export.csv",
        _table(
            '"Step","run-7 - val/iou","run-7 - val/iou__MIN","run-7 - val/iou__MAX","run-7 - val_ema/iou"',
            lambda i, b, e: f'"{100 * i}","{b}","{b - 0.01}","{b + 0.01}","{e}"',
        ),
        "run-7 - val/iou",
        "run-7 - val_ema/iou",
    ),
    "W&B, a run": Format("history.csv", _wandb_history, "val/acc"),
    "MLflow, a metric": Format("val_iou", _text(lambda i, b, e: f"17000000{i:05d} {b} {i}"), "val_iou"),
    "MLflow, a table": Format("metrics.csv", _mlflow_table, "val_acc"),
    "TensorBoard's CSV": Format(
        "run-x-tag-val_iou.csv", _table("Wall time,Step,Value", lambda i, b, e: f"1700000000.5,{100 * i},{b}"), "val_iou"
    ),
    "fairseq": Format("train.log", _fairseq, "valid/bleu"),
    "Megatron": Format("out.txt", _megatron, "validation/lm loss value"),
    "PaddleSeg": Format(
        "out.txt",
        _text(
            lambda i, b, e: f"2021-03-01 10:00:00 [INFO]\t[TRAIN] epoch: 1, iter: {1000 * (i + 1)}/160000, loss: 0.5, "
            f"lr: 0.01, ips: 20.1 samples/sec | ETA 10:00:00\n"
            f"2021-03-01 10:00:00 [INFO]\t[EVAL] #Images: 500, mIoU: {b:.5f}, Acc: 0.9, Kappa: 0.8"
        ),
        "eval/mIoU",
    ),
    "fastai": Format(
        "out.txt",
        _table("epoch     train_loss  valid_loss  accuracy  time    ", lambda i, b, e: f"{i}   0.5   0.4   {b:.6f}   00:10"),
        "accuracy",
    ),
    "skorch": Format(
        "out.txt",
        _table(
            "  epoch    train_loss    valid_acc    valid_loss     dur\n-------  ------------  -----------  ------------  ------",
            lambda i, b, e: f"      {i + 1}        0.6951       {b:.6f}        0.69  0.0213",
        ),
        "valid_acc",
    ),
    "a table of bars": Format(
        "log.md",
        _table("| Epoch | Train Loss | Val mIoU |\n|---|---|---|", lambda i, b, e: f"| {i} | 0.5 | {b} |"),
        "Val mIoU",
    ),
    "a row for each split": Format(
        "log.csv",
        _table("epoch,phase,loss,acc", lambda i, b, e: f"{i},train,0.3,0.99\n{i},val,0.4,{b}"),
        "val/acc",
    ),
    "tensors in a CSV": Format(
        "log.csv",
        _table("epoch,val_loss,val_iou", lambda i, b, e: f"{i},tensor(0.5),\"tensor({b}, device='cuda:0')\""),
        "val_iou",
    ),
    "semicolons, decimal commas, percent": Format(
        "log.csv",
        _table("Epoch;Train Loss;Val Acc (%)", lambda i, b, e: f"{i};0,5;{100 * b:.3f}%".replace(".", ",")),
        "Val Acc (%)",
        scale=100,
    ),
    "nested JSON": Format(
        "log.json",
        lambda base, ema: json.dumps({f"epoch_{i}": {"train": {"loss": 0.5}, "val": {"mIoU": b}} for i, b in enumerate(base)}),
        "val/mIoU",
    ),
    "JSON that was cut off": Format(
        "log.jsonl",
        lambda base, ema: _lines([{"epoch": i, "val_iou": b} for i, b in enumerate(base)]) + '{"epoch": 99, "val_',
        "val_iou",
    ),
    "progress bars between": Format("train.log", _bars, "Val IoU"),
    "a logger's lines": Format(
        "train.log",
        _text(
            lambda i, b, e: f"2024-11-23 10:15:35,789 INFO [models.training] Epoch {i + 1}/400 - Train Loss: 2.3456, "
            f"Val Acc: {b:.5f}\n2024-11-23 10:15:35,790 INFO [models.callbacks] Saved best model (val_acc={b:.5f})"
        ),
        "Val Acc",
    ),
    "one line a split": Format(
        "log.txt",
        _text(
            lambda i, b, e: f"resnet-50 - Epoch {i}/400\n----------\ntrain Loss: 2.2 Top-1 Acc: 97.1 Top-5 Acc: 99.1\n"
            f"test Loss: 1.8 Top-1 Acc: {100 * b:.4f} Top-5 Acc: 99.5"
        ),
        "test/Top-1 Acc",
        scale=100,
    ),
    "a test after the epoch": Format(
        "log.md",
        _text(
            lambda i, b, e: f"Epoch: {i + 1}\nLearning rate: 0.005000\nTrain Epoch: {i + 1} Loss: 5.872 Acc@1 3.611 Acc@5 "
            f"11.045: 100%|███| 10010/10010 [3:06:24<00:00,  1.12s/it]\n\nTest set: Average loss: 2.1, Acc@1: "
            f"{100 * b:.3f}%, Acc@5: 99.5%\nGPU Memory: 0.33 GB (Max: 14.24 GB)"
        ),
        "test/Acc@1",
        scale=100,
    ),
    "indented lines": Format(
        "log.txt",
        _text(lambda i, b, e: f"Epoch {i + 1} of 400 completed in 801.3s\n   Train Loss: 0.1\n   Val Dice: {b:.5f}\n   New best"),
        "Val Dice",
    ),
    "key=value": Format(
        "log.txt",
        _text(lambda i, b, e: f"INFO:root:step={1000 * (i + 1)} eval/acc={b:.5f} eval/ema_acc={e:.5f} lr=1.00e-04"),
        "eval/acc",
        "eval/ema_acc",
    ),
    "[epoch/epochs]": Format("log.txt", _text(lambda i, b, e: f"[{i + 1}/400] train_loss=0.5 val_iou={b:.5f}"), "val_iou"),
    "percent in a text": Format(
        "log.txt",
        _text(lambda i, b, e: f"epoch={i}\tloss=1.2e-3\tval mean IoU: {100 * b:.3f} %\tEMA val mean IoU: {100 * e:.3f} %"),
        "val mean IoU",
        "EMA val mean IoU",
        100,
    ),
    "PyTorch's ImageNet example": Format(
        "out.txt",
        _text(
            lambda i, b, e: f"Epoch: [{i}][  0/100]\tTime 0.5 ( 0.5)\tLoss 2.1e+00 (2.2e+00)\tAcc@1  10.00 ( 10.00)\n"
            f"Test: [ 0/50]\tTime  1.0 ( 1.0)\tLoss 1.1e+00 (1.1e+00)\tAcc@1  70.00 ( 70.00)\n"
            f" *   Acc@1 {100 * b:.4f} Acc@5 95.0"
        ),
        "Acc@1",
        scale=100,
    ),
    "a row for each model": Format(
        "log.csv", _table("epoch,model,acc", lambda i, b, e: f"{i},base,{b}\n{i},ema,{e}"), "acc", "ema/acc"
    ),
    "the average without a split": Format(
        "log.txt", _text(lambda i, b, e: f"Epoch:{i} Val_mAP:{b:.5f} EMA_mAP:{e:.5f}"), "Val_mAP", "EMA_mAP"
    ),
    "a bar of a text": Format("log.txt", _text(lambda i, b, e: f"epoch {i} | val_dsc: {b:.5f}"), "val_dsc"),
}  # fmt: skip
