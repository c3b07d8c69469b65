"""The Hugging Face Trainer with FastEMATrainerCallback, on a language model of a few thousand weights.

pip install ".[transformers]"
python docs/examples/hf_trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from fastema.integrations.transformers import FastEMATrainerCallback


def sequences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return sequences that count upwards modulo 16, each from a start of its own."""
    starts = torch.randint(0, 16, (count, 1), generator=torch.Generator().manual_seed(seed))
    tokens = (starts + torch.arange(12)) % 16
    return [{"input_ids": row, "labels": row} for row in tokens]


def new_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=12, n_embd=16, n_layer=1, n_head=2))


def main(epochs: int = 4) -> None:
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=new_model(),
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=8,
                learning_rate=2e-2,
                eval_strategy="epoch",
                save_strategy="epoch",
                logging_strategy="no",
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=sequences(256, seed=1),
            eval_dataset=sequences(64, seed=2),
        )
        callback = FastEMATrainerCallback(decay=0.9, decay_type="threshold").attach(trainer)
        trainer.train()
        metrics = trainer.evaluate()
        print(f"loss {metrics['eval_loss']:.3f}, of the average {metrics['eval_ema_loss']:.3f}")
        assert callback.ema is not None
        latest = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        averaged = new_model()
        safetensors.torch.load_model(averaged, latest / "ema.safetensors")  # the averaged weights, tied ones included
        print(f"{latest.name} has {sorted(path.name for path in latest.glob('ema*'))}")


if __name__ == "__main__":
    main()
