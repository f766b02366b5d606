"""A checkpoint as a model: evaluate, predict, export. Nothing here loads Lightning."""
