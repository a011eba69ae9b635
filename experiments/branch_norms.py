"""A branch norm that was tried and is not better than those of the library.

`bounded`   divides by sqrt(mean square + 0.1): the root mean square of a branch becomes at most 1,
            and small branches stay small, so that the null can still switch a branch off

Use it with `oasis --extension experiments/branch_norms.py ...`, or import the file in Python.
"""

import torch.nn.functional as F
from torch import Tensor

from oasis_attn import register_branch_norm


def bounded(x_BTD: Tensor, kind: str) -> Tensor:  # noqa: ARG001
    return F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=0.1)


register_branch_norm("bounded", bounded)
