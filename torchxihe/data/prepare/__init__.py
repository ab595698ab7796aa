"""From documents to a token store; not needed in training."""
