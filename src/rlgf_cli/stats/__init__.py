"""Intervals, tests and aggregates."""
