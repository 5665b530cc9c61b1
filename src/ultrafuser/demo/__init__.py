"""The embedded end-to-end run: a small world, three specialists, one fusion, and the proof."""
