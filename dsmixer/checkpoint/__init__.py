"""What a run saves to go on from: weights, moments and cursors, whole and independent of the layout."""
