"""The classic mistakes with batch normalization: rules, and what finds them in a model or a file."""
