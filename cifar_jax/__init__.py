"""cifar_jax: two published CIFAR-10 classifiers, an All-CNN and a LeNet-5 variant, in JAX."""

__version__ = "0.1.0"

from cifar_jax.pretrained import load_pretrained, pretrained_names

__all__ = ["__version__", "load_pretrained", "pretrained_names"]
