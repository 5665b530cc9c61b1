"""What was made: looked at, counted, drawn, written as a data set."""
