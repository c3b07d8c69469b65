"""Benchmarks: fastema beside its peers, in one run, every figure beside the machine's own limit.

`python -m bench.update` prints tables a person can read and with `--json FILE` writes records a program can read.
What is measured is in `cases`, who is measured in `peers`, how in `measure`. Timings are reported, never asserted.
"""
