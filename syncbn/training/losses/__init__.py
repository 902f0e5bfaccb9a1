"""What is minimized: a sum and a count."""
