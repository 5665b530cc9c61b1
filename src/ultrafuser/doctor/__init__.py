"""Checks of a recipe before any weight is loaded."""
