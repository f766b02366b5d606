"""What may be said in a configuration: names, types, ranges; and how errors are told."""
