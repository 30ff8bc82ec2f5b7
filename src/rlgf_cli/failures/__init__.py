"""Failures of texts: kinds that are made on purpose, rules that detect failures, and rules that repair them."""
