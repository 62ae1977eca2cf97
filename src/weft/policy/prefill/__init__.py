"""Decision: in what order waiting requests of the turn's model begin or come back."""
