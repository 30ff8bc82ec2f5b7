"""One module per command that works on data: its ``run`` takes a resolved config and writes a run folder or a file."""
