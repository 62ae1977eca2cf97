"""The rough side: turns actions into tensors, streams and copies. Never chooses memory."""
