"""The records of a run: metrics.jsonl, wandb, console output, and summaries."""
