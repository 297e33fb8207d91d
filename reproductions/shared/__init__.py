"""What both reproductions use."""
