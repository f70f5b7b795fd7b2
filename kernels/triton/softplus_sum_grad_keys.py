"""softplus_sum_grad_keys in Triton: the kernel of logsumexp_grad_keys with a sigmoid instead of the exponential.

row k = sum_b weight_b sigmoid(scale s_bk + offset) q_b   inside the pool
"""

from torch import Tensor

from .launch import launcher
from .logsumexp_grad_keys import grad_keys
from .pool import kernel_pool


@launcher
def softplus_sum_grad_keys(
    query: Tensor, negative_keys: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, *pool: Tensor | bool | None
) -> Tensor:
    """(K, D) fp32."""
    columns = kernel_pool(pool)
    return grad_keys(query, negative_keys, scale, (-offset).expand(query.shape[0]), weight, columns, sigmoid=True)
