"""The demo model that ships with the package, and its training."""
