"""The averages of a model: their storages, their updates and their states."""
