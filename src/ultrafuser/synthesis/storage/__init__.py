"""What was asked and what came of it, in SQLite or PostgreSQL."""
