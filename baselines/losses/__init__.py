"""The losses of AF3 training. Each file holds the terms of one head."""
