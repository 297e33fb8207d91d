"""A small LLaVA on real drawings and handwritten digits: the paper's protocol within minutes on two CPU cores."""
