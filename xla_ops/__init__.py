"""DCNv3, the operator of InternImage, for JAX."""

from xla_ops.dcnv3 import Implementation, dcnv3

__all__ = ["Implementation", "dcnv3"]
