"""Our first good LeNet-5 recipe: larger batches, weight decay, warm-up and cosine, crops and flips.

python -m cifar_jax.train lenet5
"""

from cifar_jax.configs.default import Config

CONFIG = Config(
    workdir="runs/lenet5",
    model="lenet5",
    dropout_rates=(0.0, 0.0),
    input_scaling="standardized",
    batch_size=128,
    num_epochs=45,
    learning_rate=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-3,
    schedule="cosine",
    warmup_fraction=0.05,
    crop_padding=3,
    random_flip=True,
)
