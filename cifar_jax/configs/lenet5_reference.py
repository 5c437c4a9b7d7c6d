"""The PyTorch notebook's LeNet-5 recipe: batch 4, 15 epochs, constant rate.

python -m cifar_jax.train lenet5_reference

An epoch has 12,500 steps. There is no augmentation and no weight decay. The notebook's log ends at 70.20 %, tested with
dropout on (as `python -m cifar_jax.evaluate --eval-dropout` does).
Here it gives 71.63 ± 0.62 % (three seeds: benchmarks/results/parity_lenet5.json), in 18 minutes on one core of a busy
machine (lenet5_reference.json).
"""

from cifar_jax.configs.base import Config

CONFIG = Config(
    workdir="runs/lenet5_reference",
    model="lenet5",
    dropout_rates=(0.2, 0.2),
    input_scaling="symmetric",
    batch_size=4,
    num_epochs=15,
    learning_rate=1e-4,
    momentum=0.9,
)
