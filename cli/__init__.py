"""The `sentinel-node` commands: they parse, call one thing and print."""
