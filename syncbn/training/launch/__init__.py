"""What surrounds a job: overrides, resolvers, the process group, Hydra's callbacks, errors."""
