"""The parts of a fine-tune: which parameters learn, and how the others are held."""
