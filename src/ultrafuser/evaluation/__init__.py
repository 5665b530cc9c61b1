"""Scoring any Generator on held-out records and items."""
