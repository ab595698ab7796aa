"""Every option, how a TOML file becomes a config, and what is checked."""
