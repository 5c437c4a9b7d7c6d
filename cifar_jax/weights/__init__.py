"""Weights in the files of every framework.

| module | what it holds |
| --- | --- |
| files | `load_weights`, `save_weights`: the entrance |
| params | a network's parameters as an ordered list of layers |
| pairing | which tensor of a file is which layer's |
| scaling, metadata | how pixels are scaled, in numbers; what our own files say beside the tensors |
| safetensors_files | our own files |
| pytorch, pytorch_files, torch_pickle | twins of the networks in PyTorch; its files; the pickles in them |
| keras, keras_files, hdf5_worker | twins of the networks in Keras; its files; their reader, in a process of its own |
| keras_json, keras_layers, keras_import | what an architecture computes; a file as one of our networks |

No framework is imported before it is needed. A network is known here by its class alone; only the tables of twins name
networks.
"""
