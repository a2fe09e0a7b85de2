"""The seed peer: the DHT's entry point, relay, and server of the run's manifest."""
