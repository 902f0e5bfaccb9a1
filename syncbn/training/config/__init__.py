"""The configuration: schemas, parsing, errors that name the key. Never imports torch."""
