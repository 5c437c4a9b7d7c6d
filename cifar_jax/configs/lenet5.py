"""LeNet-5 trained well: Muon, one cycle, crops, alternating flips, cutout, label smoothing and averaged weights.

python -m cifar_jax.train lenet5
"""

from cifar_jax.configs.default import Config

CONFIG = Config(
    workdir="runs/lenet5",
    model="lenet5",
    dropout_rates=(0.0, 0.0),
    input_scaling="standardized",
    initializer="he",
    batch_size=256,
    num_epochs=160,
    optimizer="muon",
    learning_rate=0.012,
    momentum=0.95,
    nesterov=True,
    weight_decay=0.1,
    schedule="one_cycle",
    warmup_fraction=0.05,
    ema_decay=0.995,
    label_smoothing=0.1,
    crop_padding=4,
    alternating_flip=True,
    cutout_size=8,
)
