"""The operations that training spends its time in, each with its reference."""
