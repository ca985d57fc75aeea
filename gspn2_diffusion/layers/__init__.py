"""Building blocks: the four-direction mixer and what surrounds it."""
