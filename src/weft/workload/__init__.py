"""Trace rows, their mapping onto a pool's models, and generators of arrivals. Pure."""
