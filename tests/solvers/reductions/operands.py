"""Operands of many shapes, dtypes and layouts."""

import torch
from hypothesis import strategies as st

D = torch.float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
LARGE = 1 << 16  # more than a block and a segment of any kernel
LAYOUTS = ["contiguous", "channels last", "transposed", "sliced", "expanded"]
SHAPES = {
    "batch": st.integers(1, 5),
    "features": st.lists(st.integers(1, 9), min_size=1, max_size=3),
    "dtype": st.sampled_from(list(TOLERANCE)),
    "layout": st.sampled_from(LAYOUTS),
    "seed": st.integers(0, 10_000),
}


def laid_out(r, layout):
    match layout:
        case "channels last" if r.ndim == 4:
            return r.contiguous(memory_format=torch.channels_last)
        case "transposed":
            return r.movedim(-1, 1).contiguous().movedim(1, -1)
        case "sliced":
            return torch.cat([r, r], -1)[..., : r.shape[-1]]
        case "expanded":
            return r[:1].expand_as(r)
    return r
