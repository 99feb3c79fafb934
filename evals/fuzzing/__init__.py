"""The parts of `evals.fuzz`: frames, the coverage-guided target, and the flood over a real socket."""
