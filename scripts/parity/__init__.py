"""What parity_keras.py and parity_pytorch.py share: the checks that compare cifar_jax with a reference network.

reference.py      the other framework's network, as the checks see it
ours.py           cifar_jax's networks, initial weights, logits and gradients
check.py          a row of the table, and differences of tensors
forward.py        logits, activations, loss and gradients of one batch
training.py       the optimizer over given gradients, and free steps of a recipe
distributions.py  initial tensors, drawn anew
predictions.py    trained weights over the test set
command.py        the command line

Every check returns rows, see check.Check.
"""
