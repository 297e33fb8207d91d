"""Pages, and the programs that make some of them."""
