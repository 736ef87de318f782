"""The engine of `svit train` and `svit validate`: recipes, data, the loop, evaluation, what is saved."""
