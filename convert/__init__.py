"""PyTorch checkpoints of InternImage to Flax parameters, and back; torch is not needed."""

from convert.conversion import convert, open_model, read_arrays
from convert.torch_file import CheckpointError

__all__ = ["CheckpointError", "convert", "open_model", "read_arrays"]
