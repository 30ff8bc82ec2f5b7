"""Configs: one pydantic model per stage (unknown keys are refused) and the loader that merges the sources."""
