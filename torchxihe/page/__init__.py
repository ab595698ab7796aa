"""Runs as HTML: the report of one run, and the page that shows runs live and talks to models."""
