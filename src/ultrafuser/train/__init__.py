"""Two-stage training (Algorithm 1)."""
