"""How weights move: optimizers, schedules, updates that can be left out, averages."""
