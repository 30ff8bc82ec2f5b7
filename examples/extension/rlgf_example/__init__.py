"""A package that extends rlgf by a reward, a metric, a guide and a task: docs/extensions.md."""
