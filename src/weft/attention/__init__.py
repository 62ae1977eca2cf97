"""Attention backends behind plan()/run()."""
