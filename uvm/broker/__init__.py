"""The broker: carries out for hands what the Architect granted, and nothing else. Layer 3."""
