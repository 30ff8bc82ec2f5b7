"""The training loop: rollouts, scores, log-probabilities, advantages, updates."""
