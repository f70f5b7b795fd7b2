"""softplus_sum_grad_bias in Triton: the kernel of logsumexp_grad_bias with a sigmoid in the place of its exponential.

element k = sum_b weight_b sigmoid(scale s_bk + bias_k + offset)   inside the pool
"""

from torch import Tensor

from .launch import launcher
from .logsumexp_grad_bias import grad_bias
from .pool import kernel_pool


@launcher
def softplus_sum_grad_bias(
    query: Tensor, negative_keys: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, *pool: Tensor | bool | None
) -> Tensor:
    """(K,) fp32."""
    columns = kernel_pool(pool)
    return grad_bias(query, negative_keys, scale, (-offset).expand(query.shape[0]), weight, columns, sigmoid=True)
