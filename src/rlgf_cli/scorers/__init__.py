"""Scorers: rewards (one score per text) and metrics (figures of a set of texts), and what builds them from config."""
