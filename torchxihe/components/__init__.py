"""What the step uses beside the model: optimizer, schedule, checkpoints, metrics, validation."""
