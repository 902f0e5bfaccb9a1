"""Audit for classic batch normalization mistakes: the rules, and their checks of a model or a checkpoint."""
