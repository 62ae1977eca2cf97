"""The process that owns a device: receive -> handle -> tell -> submit -> poll."""
