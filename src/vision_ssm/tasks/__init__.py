"""Training and using classifiers: the Lightning module, evaluation, and the folder a run leaves."""
