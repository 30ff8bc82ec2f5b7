"""The files that stages read and write: JSONL records, run folders, checkpoints."""
