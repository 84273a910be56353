"""The base model: loading it, finding its projections, and putting mixers on them."""
