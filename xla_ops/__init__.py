"""The operators of InternImage for JAX: DCNv3, and the layers around it that gain by a kernel."""

from xla_ops._ffi import Status, export_checks, status
from xla_ops.bias_gelu import bias_gelu
from xla_ops.convolution import convolution
from xla_ops.dcnv3 import Implementation, dcnv3, dcnv3_fused
from xla_ops.dwconv import dwconv_norm_gelu
from xla_ops.dwconv_jnp import depthwise_convolution
from xla_ops.geometry import Record
from xla_ops.layer_norm import add_norm, layer_norm, norm_add
from xla_ops.layers import LayerParameters, layers, layers_pay
from xla_ops.linear import linear
from xla_ops.mlp import mlp
from xla_ops.panels import in_panels, reads_panels

__all__ = [
    "Implementation",
    "LayerParameters",
    "Record",
    "Status",
    "add_norm",
    "bias_gelu",
    "convolution",
    "dcnv3",
    "dcnv3_fused",
    "depthwise_convolution",
    "dwconv_norm_gelu",
    "export_checks",
    "in_panels",
    "layer_norm",
    "layers",
    "layers_pay",
    "linear",
    "mlp",
    "norm_add",
    "reads_panels",
    "status",
]
