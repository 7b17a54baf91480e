"""The embedded demo model and its training."""
