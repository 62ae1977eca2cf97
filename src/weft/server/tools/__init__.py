"""Function calls: what templates are shown, what answers are read for, how they are enforced."""
