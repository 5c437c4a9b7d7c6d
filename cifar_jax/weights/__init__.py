"""Reads and writes weight files of JAX, PyTorch and Keras.

| module | purpose |
| --- | --- |
| files | entry point: `load_weights`, `save_weights` |
| params | a network's parameters as an ordered list of layers |
| pairing | assigns a file's tensors to layers |
| scaling, metadata | numbers of the pixel scaling; metadata of cifar_jax's files |
| safetensors_files | cifar_jax's own format |
| pytorch, pytorch_files, torch_pickle | the networks in PyTorch (twins); its files; the pickles in them |
| keras, keras_files, hdf5_worker | the networks in Keras (twins); its files; their reader, a separate process |
| keras_json, keras_layers, keras_import | what an architecture computes; matching it with a network |

Frameworks are imported only when needed. Only the tables of twins name networks; all else comes from a network's class.
"""
