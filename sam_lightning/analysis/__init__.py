"""The loss around trained weights: sharpness, curvature, landscapes."""
