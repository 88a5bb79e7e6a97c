"""DCNv3, the operator of InternImage, for JAX."""

from xla_ops._ffi import Status, status
from xla_ops.dcnv3 import Implementation, dcnv3, dcnv3_fused
from xla_ops.geometry import Record

__all__ = ["Implementation", "Record", "Status", "dcnv3", "dcnv3_fused", "status"]
