"""From documents to batches, in an order that depends on nothing but the seed."""
