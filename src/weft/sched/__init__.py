"""The unit's scheduler: batches, turns, residency, step credits. Events in, actions out."""
