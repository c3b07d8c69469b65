"""What only a GPU can show: `python -m bench.gpu CALL --results FOLDER`. docs/devices.md has the plan of the calls.

`steps` lists the commands of each call; `runner` runs them and keeps what came out in FOLDER (`results`); `outcomes`
does so for single tests, in pytest. `machine`, `usable`, `blocks`, `cases`, `overlap`, `peers` and `binary` are such
commands, and `bench.gpu_lab` is one more. `rehearse` runs every call where there is no GPU.
"""
