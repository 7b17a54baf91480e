"""Opening a model and knowing where its parts are. Everything that depends on a model family lives in this package."""
