"""Gates. On a CPU torch's own compute the last few numbers of a tensor in another way than the others, so that bits
would depend on what else is in the batch; its exponential and logarithm do not."""

import torch.nn.functional as F
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), in the dtype of x"""
    return x.float().neg().exp_().add_(1).reciprocal_().to(x.dtype) if x.is_cpu else x.sigmoid()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) of x f32"""
    return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0)) if x.is_cpu else F.softplus(x)
