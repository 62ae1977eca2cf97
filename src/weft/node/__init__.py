"""The node agent: host memory, weight images, and the lives of the workers."""
