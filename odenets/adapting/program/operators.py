"""Operators of torch by what they mean for a residual addition; by their names without namespace and overload."""

from __future__ import annotations

__all__ = ["ELEMENTWISE", "FUSED", "JOINING", "LINEAR", "PACKED", "READING", "SAME_VALUES", "SUMS"]

# fmt: off
SAME_VALUES = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "clone", "contiguous", "detach", "alias", "flatten", "squeeze",
    "unsqueeze", "lift_fresh", "lift_fresh_copy", "slice", "copy", "view_copy",
})
"""The result has the elements of the first operand in the same order, where it has as many."""

PACKED = frozenset({
    "linear", "linear_relu", "linear_dynamic", "linear_relu_dynamic", "conv1d", "conv2d", "conv3d", "conv1d_relu",
    "conv2d_relu", "conv3d_relu",
})
"""Quantized layers, which hold their weights packed."""

LINEAR = frozenset({
    "convolution", "_convolution", "mkldnn_convolution", "conv1d", "conv2d", "conv3d", "linear", "linear_dynamic",
    "addmm", "mm", "matmul", "bmm", "baddbmm", "_fft_r2c", "_fft_c2c", "_fft_c2r", "view_as_real", "view_as_complex",
    "real", "imag", "_conj", "_to_copy", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "miopen_batch_norm", "batch_norm", "native_layer_norm", "layer_norm", "native_group_norm",
    "group_norm", "rms_norm", "_fused_rms_norm", "instance_norm", "amax", "max", "mean", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "max_pool2d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "quantized_max_pool1d", "quantized_max_pool2d",
    "constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "slice",
    "select", "narrow", "index", "index_select", "split", "split_with_sizes", "chunk", "unbind", "permute", "transpose",
    "t", "as_strided", "view", "_unsafe_view", "reshape", "clone", "expand", "repeat", "unsqueeze", "squeeze",
    "flatten", "contiguous", "detach", "alias", "cat", "to", "feature_dropout", "roll", "flip", "im2col", "col2im",
    "pixel_shuffle", "pixel_unshuffle", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", "upsample_bicubic2d", "mul", "div", "neg", "add", "sub", "dropout", "written",
})
"""Linear maps, norms and poolings of what depends on the input, where that is one operand: what projections are of."""

JOINING = frozenset({"add", "sub", "cat", "stack", "written"})
"""Linear in several operands together."""

ELEMENTWISE = frozenset({
    "relu", "relu6", "gelu", "silu", "hardswish", "hardtanh", "leaky_relu", "elu", "selu", "celu", "tanh", "sigmoid",
    "hardsigmoid", "mish", "softplus", "clamp", "clamp_min", "_prelu_kernel", "prelu", "mul", "div",
})
"""Of one operand that depends on the input: on a sum they belong to its step."""

FUSED = frozenset({
    "addbmm", "addcdiv", "addcmul", "addmm", "addmv", "addr", "baddbmm", "index_add", "lerp", "scatter_add",
})
"""Sums of their first operand and of what they compute of the others."""

SUMS = FUSED | {"add", "sub", "sum", "add_relu"}
"""Sums, also of what is stacked."""

READING = frozenset({"_local_scalar_dense", "is_nonzero", "equal"})
"""What Python sees depends on the data."""
