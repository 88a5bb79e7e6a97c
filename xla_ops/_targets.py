"""The targets of the custom calls, by the names that XLA finds them by."""

from __future__ import annotations

VERSION = 4  # of the attributes and layouts; the handlers refuse another

DCNV3_FORWARD = "internimage_dcnv3_forward"
DCNV3_BACKWARD = "internimage_dcnv3_backward"
DCNV3_FUSED_FORWARD = "internimage_dcnv3_fused_forward"
DCNV3_FUSED_BACKWARD = "internimage_dcnv3_fused_backward"
DWCONV_FORWARD = "internimage_dwconv_norm_gelu_forward"
DWCONV_BACKWARD = "internimage_dwconv_norm_gelu_backward"
GELU_FORWARD = "internimage_bias_gelu_forward"
GELU_BACKWARD = "internimage_bias_gelu_backward"
NORM_FORWARD = "internimage_layer_norm_forward"
NORM_BACKWARD = "internimage_layer_norm_backward"
ADD_NORM_FORWARD = "internimage_add_norm_forward"
ADD_NORM_BACKWARD = "internimage_add_norm_backward"
NORM_ADD_FORWARD = "internimage_norm_add_forward"
LINEAR_FORWARD = "internimage_linear_forward"
LINEAR_BACKWARD = "internimage_linear_backward"  # the gradient of the kernel
LINEAR_GELU_FORWARD = "internimage_linear_gelu_forward"
CONVOLUTION_FORWARD = "internimage_convolution_forward"
CONVOLUTION_BACKWARD = "internimage_convolution_backward"  # likewise
MLP_FORWARD = "internimage_mlp_forward"
LAYERS_FORWARD = "internimage_layers_forward"

ALL = (
    *(DCNV3_FORWARD, DCNV3_BACKWARD, DCNV3_FUSED_FORWARD, DCNV3_FUSED_BACKWARD),
    *(DWCONV_FORWARD, DWCONV_BACKWARD, GELU_FORWARD, GELU_BACKWARD),
    *(NORM_FORWARD, NORM_BACKWARD, ADD_NORM_FORWARD, ADD_NORM_BACKWARD, NORM_ADD_FORWARD),
    *(LINEAR_FORWARD, LINEAR_BACKWARD, LINEAR_GELU_FORWARD, CONVOLUTION_FORWARD),
    *(CONVOLUTION_BACKWARD, MLP_FORWARD, LAYERS_FORWARD),
)
