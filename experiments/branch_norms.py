"""A branch norm that was tried and not found better.  Import the file to register it.

`bounded`   divides by sqrt(mean square + 0.1): no branch becomes larger than 1, and what is small
            stays small, so that a null can still silence a branch
"""

import torch.nn.functional as F
from torch import Tensor

from oasis_attn import register_branch_norm


def bounded(x_BTD: Tensor, kind: str) -> Tensor:  # noqa: ARG001
    return F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=0.1)


register_branch_norm("bounded", bounded)
