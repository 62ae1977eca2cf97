"""The owner of record of every request: journal, pool scheduler, and the way to the workers."""
