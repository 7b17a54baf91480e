"""Opening a model and finding its parts. Whatever depends on a model's family is in this package alone."""
