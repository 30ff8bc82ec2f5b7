"""Checks of the policy, the guide and the reward before training: `rlgf doctor` and step 0."""
