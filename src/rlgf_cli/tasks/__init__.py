"""Sources of examples: built-in tasks, files and hub datasets, and the mapping of their columns."""
