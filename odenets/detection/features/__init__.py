"""Features of a detector: numbers read off an image or its path through a network."""
