"""The mind: personas, the models that speak for them, and the engines that run the models. Layer 2."""
