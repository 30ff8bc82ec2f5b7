"""The training loop: roll, score, annotate, shape, credit, update."""
