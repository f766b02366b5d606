"""The cost of this project, compared with its peers: ``python -m benchmarks --help``."""
