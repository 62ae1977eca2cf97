"""Decides memory: granules, KV pages, host extents, slots, and what must follow what. Pure."""
