"""Alignment: n templates, one response (Section 3.1)."""
