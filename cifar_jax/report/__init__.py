"""A report of a trained network as one HTML page: python -m cifar_jax.report --out DIR

command.py      the command: loads, measures, writes
sections.py     the parts of the page
analysis.py     numbers: confidence interval, precision and recall, calibration
corruptions.py  disturbed test images, made here or read from files
figures.py      the page's figures as PNG
page.py         the page as HTML
"""

from __future__ import annotations


def main() -> int:
    from cifar_jax.report.command import main  # imported here because it takes seconds

    return main()
