"""A sweep: the runs of a grid, their processes, and the table of their evaluations."""
