"""One OpenAI-compatible endpoint as guide."""
