"""Studies of advice and of training; only `teacher` measures time.

Each is a program: `python -m bench.studies.advisor`, `python -m bench.studies.nuclei`,
`python -m bench.studies.teacher`.
"""
