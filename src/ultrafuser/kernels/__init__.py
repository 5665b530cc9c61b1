"""Products and whole passes by C of our own, compiled by the user's machine."""
