"""All-CNN, most accurate recipe: Muon, small images first, mirror symmetry, crops, alternating flips, averaged cycles.

python -m cifar_jax.train all_cnn

92.11 ± 0.03 % on the test set (3 seeds), in 178 minutes on 2 CPU cores (seed 0):
benchmarks/results/accuracy_all_cnn.json.
"""

from cifar_jax.configs.base import Config

CONFIG = Config(
    workdir="runs/all_cnn",
    model="all_cnn",
    dropout_rates=(0.0, 0.0, 0.0),
    input_scaling="standardized",
    initializer="he",
    batch_size=256,
    num_epochs=30,
    image_sizes=((16, 3), (20, 4), (24, 6)),
    optimizer="muon",
    learning_rate=0.01,
    momentum=0.95,
    nesterov=True,
    weight_decay=0.1,
    schedule="one_cycle",
    warmup_fraction=0.1,
    ema_decay=0.995,
    swa_fraction=0.2667,  # of 5,880 steps: 4 cycles of 392 steps (2 epochs)
    swa_cycles=4,
    swa_learning_rate=0.004,
    label_smoothing=0.1,
    crop_padding=4,
    alternating_flip=True,
    mirror_symmetry=True,
)
