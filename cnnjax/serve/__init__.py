"""Models behind a standard interface."""
