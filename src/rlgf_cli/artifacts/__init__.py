"""What stages leave on disk: JSONL records and run folders."""
