"""What a fusion is measured against."""
