"""Communication between ranks: rank and store, DDP, stopping on request, and errors that all ranks raise."""
