"""What the scripts share: models, data, corruptions, attacks, and the run around them."""
