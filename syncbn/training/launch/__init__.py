"""Code around a job: overrides, resolvers, the process group, Hydra's callbacks, and error messages."""
