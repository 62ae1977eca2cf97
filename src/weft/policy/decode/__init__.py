"""Decision: which model has the turn, and for how long."""
