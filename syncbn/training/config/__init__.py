"""The configuration: schemas, parsing, and errors that name the key. Never imports torch."""
