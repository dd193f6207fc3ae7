"""Text that a model writes."""

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-3, 1e3  # below the lowest the likeliest word is taken
