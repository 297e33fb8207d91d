"""What the study says: claims and verdicts on them, tables, figures, and the page that holds them all."""
