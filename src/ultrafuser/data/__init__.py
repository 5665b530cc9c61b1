"""Data: records, their formats, splits and overlaps with benchmarks."""
