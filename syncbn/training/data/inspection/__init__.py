"""A look at every sample of a data set: what there is, and what is wrong with it (`task=check`)."""
