"""Checks shared by parity_keras.py and parity_pytorch.py, which compare cifar_jax with a reference network.

reference.py      interface of the other framework's network
ours.py           cifar_jax's networks, initial weights, logits and gradients
check.py          a row of the table, differences of tensors
forward.py        logits, activations, loss and gradients of one batch
training.py       the optimizer over given gradients, free steps of a recipe
distributions.py  distributions of initial tensors
predictions.py    trained weights on the test set
command.py        the command line

Every check returns rows (check.Check).
"""
