"""Writes the tables of the README and of docs/ from benchmarks/results/*.json.

python -m benchmarks.report [--check]

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->` on its page. With --check nothing is written, and
the exit status is 1 if a page differs from what the results say. Without it the figures in docs/figures are drawn too.

The results are summary.json files of cifar_jax.train, the output of cifar_jax.evaluate --json, and what the benchmarks
and the parity scripts write.
"""
