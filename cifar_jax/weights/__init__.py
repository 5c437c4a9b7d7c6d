"""The two networks in Keras 3 and in PyTorch, and their weights in every framework's files.

`layers.py` is the common form; `pytorch.py` and `keras.py` hold the reference models and the conversions; `files.py`
reads and writes weight files by name. Nothing here imports a framework before it is needed.
"""
