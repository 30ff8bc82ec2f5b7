"""A grid of runs: which there are, how they are worked through, and the table of what came out."""
