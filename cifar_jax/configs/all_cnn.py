"""All-CNN with a plain recipe, not measured yet: SGD with weight decay, warm-up and cosine, crops and flips.

python -m cifar_jax.train all_cnn
"""

from cifar_jax.configs.base import Config

CONFIG = Config(
    workdir="runs/all_cnn",
    model="all_cnn",
    dropout_rates=(0.0, 0.1, 0.2),
    input_scaling="standardized",
    batch_size=128,
    num_epochs=50,
    learning_rate=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    schedule="cosine",
    warmup_fraction=0.05,
    crop_padding=4,
    random_flip=True,
)
