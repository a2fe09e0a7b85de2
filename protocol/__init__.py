"""What peers say to each other and what it means. Knows nothing of models or training."""
