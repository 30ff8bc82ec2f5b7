"""Pure tensor math: no state, no text, nothing of ours. B episodes, T response positions, V vocabulary."""
