"""Relatives of SAM: other directions to climb along, other ways to combine the two gradients."""
