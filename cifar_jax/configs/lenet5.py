"""LeNet-5's most accurate recipe: Muon, crops, alternating flips, cutout, label smoothing, averaged cycles.

python -m cifar_jax.train lenet5

87.57 ± 0.30 % on the test set (three seeds), in about 1.4 hours of training on 2 CPU cores or
1.9 on one: benchmarks/results/accuracy_lenet5.json.
"""

from cifar_jax.configs.base import Config

CONFIG = Config(
    workdir="runs/lenet5",
    model="lenet5",
    dropout_rates=(0.0, 0.0),
    input_scaling="standardized",
    initializer="he",
    batch_size=256,
    num_epochs=224,
    optimizer="muon",
    learning_rate=0.012,
    momentum=0.95,
    nesterov=True,
    weight_decay=0.1,
    schedule="one_cycle",
    warmup_fraction=0.05,
    ema_decay=0.995,
    swa_fraction=0.2858,  # of 43,904 steps: 8 cycles of 1,568 steps (8 epochs)
    swa_cycles=8,
    swa_learning_rate=0.006,
    label_smoothing=0.1,
    crop_padding=4,
    alternating_flip=True,
    cutout_size=8,
)
