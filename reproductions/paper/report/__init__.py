"""What is made of the folders that rows leave: tables beside the published ones, figures, findings and a page."""
