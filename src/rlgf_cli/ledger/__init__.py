"""Every cent that is spent, and every text that was bought."""
