"""The Keras program's All-CNN recipe: batch 64, 200 epochs, decaying rate, affine warps.

python -m cifar_jax.train all_cnn_reference

An epoch has 782 steps. The incomplete batch of 16 images comes last here. In the original it comes at a random place,
because Keras' fit_generator shuffles the batches. The source's "weight decay" of 5e-5 is Keras 2's `decay`:
lr_t = 0.01 / (1 + 5e-5·t), t in steps; there is no L2. The original ended at 89.9 % test accuracy.
The whole recipe has not been run here: it takes about 21 hours on 2 CPU cores.
"""

from cifar_jax.configs.base import Config

CONFIG = Config(
    workdir="runs/all_cnn_reference",
    model="all_cnn",
    dropout_rates=(0.2, 0.5, 0.5),
    input_scaling="unit",
    batch_size=64,
    num_epochs=200,
    optimizer="keras_sgd",
    learning_rate=0.01,
    momentum=0.9,
    nesterov=True,
    schedule="inverse_time",
    lr_decay=5e-5,
    rotation_degrees=10.0,
    shift_fraction=0.1,
    random_flip=True,
)
