"""The paper's experiments on top of `torch_mdgd`."""
