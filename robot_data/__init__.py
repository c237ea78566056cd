"""Robot datasets as streams of uniform steps."""
