"""Guides: recorded texts, local checkpoints, and endpoints. ``make`` creates one from a config."""
