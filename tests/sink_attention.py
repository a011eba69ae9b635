"""Attention with sinks in the dtype of the query, for `set_attn_implementation("plain_sinks")`.

The families' own functions compute the softmax in float32.  This file must not import oasis_attn: a
process without it uses the function too.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


def plain_sinks(_module, query, key, value, mask, scaling, s_aux=None, **_):
    """Softmax over the keys and, as one more column, the sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("plain_sinks", plain_sinks)
AttentionMaskInterface.register("plain_sinks", eager_mask)
