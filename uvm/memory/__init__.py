"""The Fractal Memory: what the system has learned, searched by meaning. Layer 2."""
