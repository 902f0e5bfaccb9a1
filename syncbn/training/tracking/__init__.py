"""What is told of a run: metrics.jsonl, wandb, the console, summaries."""
