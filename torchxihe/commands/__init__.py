"""One file a command, imported on demand by `torchxihe.__main__`."""
