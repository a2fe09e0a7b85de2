"""A volunteer: the stage module, serving and routing, stage rounds, state transfer, data."""
