"""The options, their parsing from TOML and the command line, and their checks."""
