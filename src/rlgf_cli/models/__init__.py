"""Policies and other HF models: loading, text formats, generation, log-probabilities and values."""
