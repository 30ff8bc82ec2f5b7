"""The accounts of runs, and the store of all texts that were bought."""
