"""Model workers: one process per loaded model, and the engines that run inside it.

The agent imports ``spec``, ``status``, ``process``, ``gate`` and ``scoring`` only. Everything that touches a native
library (in ``llama``, ``embeddings``, ``tensors``) is imported by the worker, after it has verified the model's files.
"""
