"""Injects faults into small trainings, folders and files, and counts what happens.

python -m benchmarks.faults --out FOLDER [--quick] [--rounds N] [--only FAULT …]

`faults.py` has the table of faults. A fault is a function that injects it a number of times and yields an outcome for
each; `stops`, `disks`, `companions`, `weight_files`, `data_files` and `run_files` hold them. `lab` has the training
that they disturb, in this process, and `victims` has it in processes that may be killed. `guard` reads hostile files
within bounds. `layouts` makes small datasets.
"""
