"""Step time, copy time, memory: prediction. Pure."""
