"""A real training in two phases, as two command lines."""

PHASE_1 = (
    "train --dataset-path COD10K-v3 --checkpoint-dir checkpoints --resume-from checkpoints/best_model.pth "
    "--skip-stage1 --backbone edgenext_base --num-experts 7 --batch-size 8 --stage2-batch-size 1 "
    "--accumulation-steps 4 --img-size 384 --epochs 120 --stage1-epochs 30 --lr 0.00025 --stage2-lr 0.0002 "
    "--scheduler cosine --min-lr 0.00001 --progressive-unfreeze --num-workers 4"
)
PHASE_2 = f"{PHASE_1} --checkpoint-dir checkpoints_ema --epochs 150 --use-ema --ema-decay 0.999"
