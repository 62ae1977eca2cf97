"""The nouns every room shares. Pure: no torch, no I/O, no clock."""
