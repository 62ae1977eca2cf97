"""weft: many language models on few GPUs, switched token by token, behind one endpoint."""

__version__ = "0.1.0"
