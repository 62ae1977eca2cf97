"""The `weft` command. Imports neither torch nor the server until a command needs them."""
