"""The pool's brain: who runs where, and what happens when a worker dies. Pure."""
