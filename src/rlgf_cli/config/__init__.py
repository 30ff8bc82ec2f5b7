"""Configs: one pydantic model per command, which refuses unknown keys, and the loader that merges the sources."""
