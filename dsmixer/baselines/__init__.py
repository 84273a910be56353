"""The methods of others, on the experts, rows and evaluation of a mixture: what it has to be better than."""
