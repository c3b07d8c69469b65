"""Read what the name of a column says: which way is better, of which data and weights it is, or that it is no metric.

Every list of spellings is here, so that a name which is read wrongly is mended in one place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "val", "test"]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _ranks(words: str) -> dict[str, int]:
    return {word: rank for rank, word in enumerate(words.split())}


_PARTS = ("rcnn", "rpn", "decode", "aux")
_SPLITS: dict[str, Split] = {
    # Detectron2's and mmseg's heads report on the training only.
    **dict.fromkeys(("train", "training", "tr", *_PARTS), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "evaluation", "dev", "holdout", "metrics"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Words that say with which weights a metric was measured.
_AVERAGED = frozenset({"ema", "swa", "averaged"})
_LIVE = frozenset({"base", "raw", "live", "online", "model", "original"})
# Averages of a metric over epochs, not of weights: nnU-Net's.
_SMOOTHED = (("dice", "fg"), ("dice", "pseudo"))

# Metrics of which less is better.
_LESS = _set(
    "loss losses nll bce crossentropy logloss bpb bpd bpc perplexity ppl fid kid fvd lpips epe eer wer cer mape smape "
    "mae mse rmse msle rmsle brier ece hd95 hausdorff assd masd chamfer nme mpjpe pampjpe error errors err deviance "
    "divergence rmsd jsd mmd emd wasserstein niqe brisque fpr fnr fpr95 minade minfde ade fde nelbo dcf distance "
    "regret l1 l2"
)
_LESS_TOGETHER = (
    ("cross", "entropy"), ("log", "likelihood"), ("abs", "rel"), ("sq", "rel"), ("bits", "per"), ("miss", "rate"),
)  # fmt: skip
# Too short, or words of other meanings as well: they count as the last word only.
_LESS_AT_THE_END = frozenset({"ce", "kl", "der", "per", "ter", "hd", "cd", "asd"})
_MORE_TOGETHER = (("coco", "eval"), ("success", "rate"), ("win", "rate"))
# Names of metrics, although one of their words is that of a setting elsewhere.
_SCORES_TOGETHER = (("dice", "coef"), ("jaccard", "coef"), ("s", "alpha"), ("e", "phi"), ("f", "beta"))
# Metrics of which more is better; those that are usually the main one stand first.
_RANKS = _ranks(
    "map ap miou iou jaccard mdice dice dsc pq nds hota mota f1 fscore fmeasure fbeta sm em fm wfm auroc auc auprc "
    "top accuracy acc macc aacc bleu rouge chrf meteor cider psnr ssim ndcg mrr kappa mcc r2 pearson spearman "
    "correlation corr reward rew return returns success exact score scores elbo ar pck oks idf1 amota smeasure "
    "emeasure measure similarity cosine hit hits precision recall sensitivity specificity roc rank"
)

_EPOCHS = (("epoch",), ("epochs",), ("current", "epoch"), ("ep",))
_STEPS = (
    ("global", "step"), ("trainer", "global", "step"), ("num", "updates"), ("step",), ("steps",), ("iteration",),
    ("iterations",), ("iter",), ("iters",), ("train", "global", "step"),
)  # fmt: skip
_NO_METRIC = _set(
    "epoch step steps iter iteration iterations lr time times seconds secs sec ms eta duration elapsed took memory mem "
    "grad gradnorm norm runtime timestamp created wall best std stddev stderr decay momentum flos flops throughput "
    "speed patience counter remaining wd seed fps unnamed completed finished updates gpu weight weights coef factor "
    "margin alpha beta gamma threshold type drop count num size scale eps images"
)
_NO_RATE = _set("loss drop mult decay factor gamma step steps scheduler warmup min max backbone")
_NO_METRIC_TOGETHER = (("learning", "rate"), ("per", "second"), ("weight", "decay"), ("batch", "size"))

_PLAIN = _set("mean avg average macro total loss error overall all coco bbox")

_CAMEL_PREFIX = re.compile(r"^(train|valid|val|test|eval|ema|swa|dev|model|best)(?=[A-Z])")
_CAMEL_SUFFIX = re.compile(r"(?<=[a-z\d])(EMA|Ema|IoU|Loss|Acc|Accuracy|Error|Score|Dice)$")
_CAMEL = re.compile(r"(?:[A-Z][a-z]+){2,}")
_KERAS_IOU = re.compile(r"(?<![A-Za-z])io_u(?![A-Za-z])")  # its snake case of MeanIoU is mean_io_u
_CHART = re.compile(r"__(MIN|MAX)$")  # of W&B's charts: the range that a point stands for


def words_of(name: str) -> tuple[str, ...]:
    """Return the words of a name in lower case.

    Examples:
        >>> words_of("val/mAP_50-95(B)"), words_of("valEmaLoss"), words_of("MeanIoU")
        (('val', 'map', '50', '95', 'b'), ('val', 'ema', 'loss'), ('mean', 'iou'))
    """
    name = _KERAS_IOU.sub("iou", name)
    return tuple(word for piece in re.split(r"[\W_]+", name) if piece for word in _words_of_piece(piece))


def _words_of_piece(piece: str) -> list[str]:
    if piece.lower() in _LESS or piece.lower() in _RANKS:
        return [piece.lower()]
    if match := _CAMEL_PREFIX.match(piece):
        return [match[1], *_words_of_piece(piece[match.end() :])]
    if match := _CAMEL_SUFFIX.search(piece):
        return [*_words_of_piece(piece[: match.start()]), match[1].lower()]
    if _CAMEL.fullmatch(piece):
        return [word.lower() for word in re.findall(r"[A-Z][a-z]+", piece)]
    return re.findall(r"[^\W\d]+|\d+", piece.lower())


def is_epoch(name: str) -> bool:
    """Return whether a column counts epochs."""
    return words_of(name) in _EPOCHS


def is_step(name: str) -> bool:
    """Return whether a column counts steps."""
    return words_of(name) in _STEPS


def is_learning_rate(name: str) -> bool:
    """Return whether a column is a learning rate."""
    words = words_of(name)
    return ("lr" in words or _together(words, ("learning", "rate"))) and not _NO_RATE & set(words)


def split_of(name: str) -> Split | None:
    """Return on which data a metric was measured; None: the name does not say."""
    return next((_SPLITS[word] for word in words_of(name) if word in _SPLITS), None)


def is_averaged(name: str) -> bool:
    """Return whether a metric was measured with averaged weights, by its name.

    Examples:
        >>> is_averaged("val/ema_mAP_50_95"), is_averaged("ema_fg_dice"), is_averaged("schema_loss")
        (True, False, False)
    """
    words = words_of(name)
    return bool(_AVERAGED & set(words)) and split_of(name) != "train" and key_of(name) not in _SMOOTHED


def key_of(name: str) -> tuple[str, ...]:
    """Return what a metric of the model and the same one of its average have in common."""
    left_out = _AVERAGED | _LIVE | {"epoch"}
    return tuple(sorted(word for word in words_of(name) if word not in left_out))


def twin_of(name: str) -> tuple[str, ...]:
    """Return what a metric of the training and the same one of the validation have in common."""
    return tuple(word for word in key_of(name) if word not in _SPLITS)


def known_mode_of(name: str) -> str | None:
    """Return "max" or "min"; None: an unknown name."""
    words = words_of(name)
    if words and words[0] == "neg" and _is_less(words):
        return "max"
    if _is_less(words):
        return "min"
    together = (*_MORE_TOGETHER, *_SCORES_TOGETHER)
    known = any(word in _RANKS for word in words) or any(_together(words, pair) for pair in together)
    return "max" if known else None


def mode_of(metric: str) -> str:
    """Return whether more or less is better, by the usual names.

    Raises:
        ValueError: an unknown name.

    Examples:
        >>> mode_of("val_loss"), mode_of("valLoss"), mode_of("iou"), mode_of("bits_per_dim"), mode_of("err@1")
        ('min', 'min', 'max', 'min', 'min')
    """
    mode = known_mode_of(metric)
    if mode is None:
        raise ValueError(f"is more or less of {metric!r} better? Give --mode max or --mode min")
    return mode


def is_metric(name: str) -> bool:
    """Return whether a column may be a metric: by a known name, or since it is one of the validation's."""
    if not looks_numeric(name):
        return False
    return known_mode_of(name) is not None or split_of(name) in ("val", "test")


def looks_numeric(name: str) -> bool:
    """Return whether a column may be a metric of an unknown name: it is no clock, time, rate or setting."""
    words = words_of(name)
    if not words or _CHART.search(name) or all(word.isdigit() or word in _SPLITS for word in words):
        return False
    if any(_together(words, pair) for pair in _SCORES_TOGETHER):
        words = tuple(word for word in words if word not in ("coef", "alpha", "beta"))
    if known_mode_of(name) is not None:
        # Lightning's "val_dice_epoch" and Keras's "epoch_loss" are the metric over an epoch.
        words = tuple(word for word in words if word != "epoch")
    return not (_NO_METRIC & set(words) or any(_together(words, pair) for pair in _NO_METRIC_TOGETHER))


def is_of_a_part(name: str) -> bool:
    """Return whether a metric is of one head of a model, during its training."""
    return bool(set(_PARTS) & set(words_of(name)))


def is_loss(name: str) -> bool:
    """Return whether a metric is a loss, which is judged where there is no score."""
    return bool({"loss", "losses", "nll", "l1", "l2"} & set(words_of(name)))


def importance_of(name: str) -> tuple[int, int, int]:
    """Return a key that sorts the metrics of a log, the usual main one first."""
    words = words_of(name)
    if is_loss(name):
        rank = 1000
    elif _is_less(words):
        rank = 40  # after accuracy, before the half of a score that precision and recall are
    else:
        rank = min((_RANKS[word] for word in words if word in _RANKS), default=500)
        if _together(words, ("coco", "eval")):
            rank = 0
        elif any(_together(words, pair) for pair in _SCORES_TOGETHER):
            rank = min(rank, _RANKS["sm"])
    # Of mAP50 and mAP50-95 the second is the stricter; "AP" alone is that over all thresholds.
    strict = 0 if "95" in words or not any(word in ("5", "50", "75") for word in words) else 1
    # A class or a part is named by a word that no metric has.
    named = [word for word in words if not (word.isdigit() or word in _SPLITS or word in _RANKS or word in _PLAIN)]
    return rank, strict, len(named)


def _is_less(words: Sequence[str]) -> bool:
    named = [word for word in words if not word.isdigit() and word not in _SPLITS and word not in _AVERAGED]
    return (
        any(word in _LESS for word in words)
        or any(_together(words, pair) for pair in _LESS_TOGETHER)
        or bool(named and named[-1] in _LESS_AT_THE_END)
    )


def _together(words: Sequence[str], pair: tuple[str, str]) -> bool:
    return any(tuple(words[i : i + 2]) == pair for i in range(len(words) - 1))
