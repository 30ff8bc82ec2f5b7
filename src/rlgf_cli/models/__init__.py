"""Policies and other HF models: loading, text formats, generation, scoring."""
