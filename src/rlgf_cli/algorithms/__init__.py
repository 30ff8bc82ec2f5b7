"""Algorithms are data: who rolls in, who rolls out, whose tokens learn, how credit is estimated, and when."""
