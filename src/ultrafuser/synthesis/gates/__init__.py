"""What an item must pass between two stages."""
