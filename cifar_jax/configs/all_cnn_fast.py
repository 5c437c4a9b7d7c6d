"""All-CNN in few epochs: Muon, one cycle, small images first, mirror symmetry, crops, alternating flips, EMA.

python -m cifar_jax.train all_cnn_fast
"""

from cifar_jax.configs.default import Config

CONFIG = Config(
    workdir="runs/all_cnn_fast",
    model="all_cnn",
    dropout_rates=(0.0, 0.0, 0.0),
    input_scaling="standardized",
    initializer="he",
    batch_size=256,
    num_epochs=22,
    image_sizes=((16, 3), (20, 4), (24, 6)),
    optimizer="muon",
    learning_rate=0.01,
    momentum=0.95,
    nesterov=True,
    weight_decay=0.1,
    schedule="one_cycle",
    warmup_fraction=0.1,
    ema_decay=0.995,
    label_smoothing=0.1,
    crop_padding=4,
    alternating_flip=True,
    mirror_symmetry=True,
)
