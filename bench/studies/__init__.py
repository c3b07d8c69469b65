"""Studies of advice and of training; they measure no time.

Each is a program: `python -m bench.studies.advisor`, `python -m bench.studies.nuclei`.
"""
