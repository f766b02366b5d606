"""Two passes and one step, built from a configuration and run to the end."""
