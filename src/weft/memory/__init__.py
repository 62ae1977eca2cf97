"""Memory as the rough side holds it: the device arena and the node's host store."""
