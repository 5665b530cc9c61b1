"""What a recipe will take, known before it starts: parameters, memory, tokens, disk, hours."""
