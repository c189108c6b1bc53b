"""Training: one step, one loop, and everything a run leaves behind."""
