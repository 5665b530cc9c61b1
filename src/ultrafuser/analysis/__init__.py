"""What a run found: typed results, intervals, the report page and the terminal tables."""
