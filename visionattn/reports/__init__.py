"""Pictures of runs: their curves, and a page about what a model makes of its validation images."""
