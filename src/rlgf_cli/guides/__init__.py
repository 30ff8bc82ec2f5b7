"""Guides: recorded text, a local checkpoint, or an endpoint. ``make`` turns a config into one of them."""
