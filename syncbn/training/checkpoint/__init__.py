"""What survives a job: its state by name, the files, and the rules of going on from them."""
