"""Generates the tables in README and docs/ from benchmarks/results/*.json.

python -m benchmarks.report [--check]

A table is between `<!-- begin NAME -->` and `<!-- end NAME -->` on its page. The command also draws the figures in
docs/figures. With --check it writes nothing, and the exit status is 1 if a page differs from the results.

The results are summary.json files of cifar_jax.train, the output of cifar_jax.evaluate --json, and the output of the
benchmarks and parity scripts.
"""
