"""Tensor functions: attention with a null option, and attention over depth."""

from oasis_attn.ops.depth_mix import depth_mix
from oasis_attn.ops.normalizers import normalize
from oasis_attn.ops.null_attention import null_attention

__all__ = ["depth_mix", "normalize", "null_attention"]
