"""UltraChat 2: a set of instructions and answers made in stages by other models (Section 3.2)."""
