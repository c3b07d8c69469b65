"""Benchmarks: fastema beside its peers, in one run.

The files of this folder are the commands. `python -m bench.update [--quick] [--json FILE]` prints tables and writes
records, and so do `swap`, `scale`, `memory`, `train_step` and `instructions`; `bench.busy`, beside processes that it starts itself, runs alone; `bench.all` runs all others. `bench.report`
turns records into plots and README's tables, `bench.compare` finds what got slower. `harness` measures, `contenders`
are the implementations, `pages` makes the report, `studies` measure advice and training instead of time.
Timings are reported, never asserted.
"""
