"""Triton kernels for CUDA that read each source once.

With PyTorch's operations, each operation on each source is a pass over memory.  A kernel here
receives the addresses of its sources as a tensor, and one program reads all sources of a token.
Sums are accumulated in the dtype of the weights or scores, float32 or float64.
"""

from oasis_attn.ops.depth_mix.triton_kernels.mix import mix
from oasis_attn.ops.depth_mix.triton_kernels.scores import can_score, score_gradients, scores
from oasis_attn.ops.depth_mix.triton_kernels.sums import can_add, fits, sum_gradients, weighted_sum
from oasis_attn.ops.depth_mix.triton_kernels.weights import weight_gradients, weights

__all__ = [
    "can_add",
    "can_score",
    "fits",
    "mix",
    "score_gradients",
    "scores",
    "sum_gradients",
    "weight_gradients",
    "weighted_sum",
    "weights",
]
