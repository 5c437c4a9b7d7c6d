"""Injects faults into small runs, folders and files, and counts the outcomes.

python -m benchmarks.faults --out FOLDER [--quick] [--rounds N] [--only FAULT …]

`faults` has the table of faults. A fault is a function that injects it several times and yields one outcome each time.
The functions are in `stops`, `disks`, `companions`, `caches`, `weight_files`, `data_files` and `run_files`. `lab` runs
the disturbed training in this process, `victims` in processes that can be killed. `guard` reads malicious files with
limits.
"""
