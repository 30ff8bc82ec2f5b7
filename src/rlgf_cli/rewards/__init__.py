"""Rewards: one number per finished text. ``make`` builds them from config, ``checked`` guards them."""
