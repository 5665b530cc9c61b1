"""Recipes: frozen settings that reproduce a model."""
