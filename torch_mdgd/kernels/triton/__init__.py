"""The kernels in Triton, for CUDA: one launch per operation for a whole list of parameters.

Kernels get a table of addresses instead of tensors (:mod:`chunks`), which a tracer cannot follow, so the operations
that a training step needs are ``torch.library.custom_op``: whole for ``torch.compile``, without a graph break.
"""

from torch_mdgd.kernels.triton.combine import combine_
from torch_mdgd.kernels.triton.products import inner_products
from torch_mdgd.kernels.triton.selection import top_k_masks, top_k_similarity_masks

__all__ = ["combine_", "inner_products", "top_k_masks", "top_k_similarity_masks"]
