from __future__ import annotations

if __name__ == "__main__":
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()

import sys

from cifar_jax.report import main

if __name__ == "__main__":
    sys.exit(main())
