"""softplus_sum_grad_keys in Triton: the kernel of logsumexp_grad_keys with a sigmoid in the place of its exponential.

row k = sum_b weight_b sigmoid(scale s_bk + bias) q_b   inside the pool
"""

from torch import Tensor

from .launch import launcher
from .logsumexp_grad_keys import launch


@launcher
def softplus_sum_grad_keys(
    query: Tensor, negative_keys: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, *pool: Tensor | None
) -> Tensor:
    """(K, D) fp32."""
    return launch(query, negative_keys, scale, (-bias).expand(query.shape[0]), weight, pool, sigmoid=True)
