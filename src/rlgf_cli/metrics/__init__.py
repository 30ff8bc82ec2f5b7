"""Metrics: numbers per example with a signature, and the intervals of their means."""
