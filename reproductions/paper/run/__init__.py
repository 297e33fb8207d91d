"""From the rows of a table that are asked for to the folders that they leave."""
