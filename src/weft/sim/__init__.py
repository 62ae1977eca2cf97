"""The scheduler's second body: a virtual clock and a modelled executor. Pure."""
