"""Checkpoints: saved, committed, verified, loaded, exported."""
