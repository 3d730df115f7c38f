"""What every run needs and no reader of the method does: processes, checkpoints, presets, logs, pictures."""
