"""The exponential moving average that DINO's teacher and MoCo's key network are of the trained one."""

import torch
from torch import nn


@torch.no_grad()
def update_ema(teacher: nn.Module, online: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * online, for every parameter; buffers are left alone.

    The teacher keeps its own BatchNorm statistics: it stays in train mode and sees images itself (DINO,
    Caron et al. 2021, section 3.1).
    """
    torch._foreach_lerp_(
        [parameter.data for parameter in teacher.parameters()],
        [parameter.data for parameter in online.parameters()],
        1 - momentum,
    )
