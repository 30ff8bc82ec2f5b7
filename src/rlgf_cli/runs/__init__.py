"""What surrounds a training run: its objects, files, alarms, held-out evaluation and guide costs."""
