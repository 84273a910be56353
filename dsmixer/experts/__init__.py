"""The pool of low-rank experts of one projection: its weights, their start, and the forms that compute it."""
