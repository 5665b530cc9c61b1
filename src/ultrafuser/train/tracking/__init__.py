"""What training reports while it runs: metrics.jsonl always, trackers by recipe, a progress bar for people."""
