"""How things look: one palette everywhere, and figures drawn by matplotlib."""
