"""The experiments of Tables 1 and 2 and Figures 1 to 5, ready to run where there are GPUs for them."""
