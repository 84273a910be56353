"""What a run saves to go on from: weights, moments and cursors, keyed by expert, whatever the layout."""
