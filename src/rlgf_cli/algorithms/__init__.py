"""Algorithms as data: who rolls in, who rolls out, whose tokens learn, how advantages are estimated, and when."""
