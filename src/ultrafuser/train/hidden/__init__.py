"""Stage 1 from hidden states on disk: one specialist in memory at a time."""
