"""One HTML page of runs and evaluations: folders to plain data, to plots, to a page."""
