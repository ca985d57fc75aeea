"""Measuring text-to-image models: fixed prompts, judges that are measured themselves, intervals."""
