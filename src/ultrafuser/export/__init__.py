"""A model made ready for another engine, and what that costs."""
