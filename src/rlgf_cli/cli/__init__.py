"""The command line. Modules here import nothing heavy: a stage is imported when its command runs."""
