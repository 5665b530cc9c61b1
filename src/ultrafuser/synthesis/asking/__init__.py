"""Asking: live or by batches, within a budget, and writing what became of it."""
