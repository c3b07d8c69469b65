"""Callbacks and adapters for trainers that people already use.

Each is a module of its own, so that a framework is imported only by the module made for it, and never by
`import fastema`:

- `fastema.integrations.lightning`: `EMAWeightAveraging`, as Lightning has it, and `FastEMACallback` for its Trainer
- `fastema.integrations.transformers`: `FastEMATrainerCallback` for the Hugging Face Trainer
- `fastema.integrations.timm`: `ModelEmaV3`, as timm has it
- `fastema.integrations.diffusers`: `EMAModel`, as diffusers has it
"""
