"""Supervised training: transformers' and TRL's trainers for sft and reward models."""
