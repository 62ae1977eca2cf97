"""Decision: who leaves the device when somebody else must come in."""
