"""Where people train: one file for each framework, imported only by those who use it."""
