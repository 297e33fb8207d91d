"""What the small experiment and the paper's have in common: statistics, scores, results, tables, figures."""
