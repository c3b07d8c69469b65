"""What the front doors stand on: storages, shadows, swaps, state."""
