"""Benchmarks: fastema beside its peers, in one run, every figure beside the machine's own limit.

Each of `update`, `swap`, `scale`, `memory`, `train_step` and `instructions` is a program: `python -m bench.update
[--quick] [--json FILE]` prints tables that a person can read and writes records that a program can read; `bench.all`
runs them all. `bench.busy`, beside processes that it starts itself, runs alone. `bench.report` turns files of records
into plots and README's tables, `bench.compare` says what got slower. What is measured is in `cases` and `nets`, who in
`peers` and `libraries`, how in `measure` and `clocks`.
Timings are reported, never asserted.
"""
