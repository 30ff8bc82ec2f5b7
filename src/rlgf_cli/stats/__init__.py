"""Bootstrap intervals, significance tests, ranking measures, and aggregates of per-text rows."""
