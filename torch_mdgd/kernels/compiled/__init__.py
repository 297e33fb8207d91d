"""The kernels compiled for the CPU by numba: one pass over a whole list of parameters, on as many threads as torch has.

A list is cut into chunks that stay in the first cache (:mod:`chunks`). A chunk's result does not depend on which thread
computes it, so the same data give the same bits, on any number of threads. What numba compiles it keeps on disk for
later runs.
"""

from torch_mdgd.kernels.compiled.combine import combine_
from torch_mdgd.kernels.compiled.products import inner_products
from torch_mdgd.kernels.compiled.selection import top_k_masks, top_k_similarity_masks

__all__ = ["combine_", "inner_products", "top_k_masks", "top_k_similarity_masks"]
