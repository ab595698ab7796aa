"""Memory and speed of a config on GPUs that need not be here: closed forms, calibrated on measurements."""
