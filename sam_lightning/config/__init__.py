"""What a configuration may contain: names, types, ranges; and its error messages."""
