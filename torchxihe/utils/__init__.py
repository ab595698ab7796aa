"""What every floor may use: processes, devices, logs, words."""
