"""The surroundings of the training loop: a run's objects, files, alarms, held-out evaluation and guide costs."""
