"""Benchmarks: fastema beside its peers, in one run.

The files of this folder are the commands. `python -m bench.update [--quick] [--json FILE]` prints tables and writes
records, and so do `swap`, `scale`, `memory`, `train_step` and `instructions`; `bench.all` runs them all. `bench.busy`,
beside processes that it starts itself, runs alone. `bench.report` turns records into plots and README's tables,
`bench.compare` finds what got slower. `bench.gpu` is for machines with a GPU. `harness` measures, `contenders` are the
implementations, `pages` makes the report, `studies` measure advice and training instead of time.
Timings are reported, never asserted.
"""
