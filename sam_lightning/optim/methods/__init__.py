"""Relatives of SAM: other perturbations, other ways to combine the two gradients."""
