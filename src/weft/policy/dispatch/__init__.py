"""Which unit takes a request. One answer a file."""
