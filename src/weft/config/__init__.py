"""pool.yaml: text to frozen structs that refuse unknown keys. Reading the file is the caller's."""
