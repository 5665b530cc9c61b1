"""Talking to the models that write: one address, its limits, several of them."""
