"""`farebox serve`: a model of this machine as an HTTP service."""
